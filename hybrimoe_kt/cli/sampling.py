"""How answers are drawn, from the command line."""

from __future__ import annotations

from typing import Protocol

from hybrimoe_kt.engine.sampling import Sampling

__all__ = ["SamplingOptions", "sampling_of"]


class SamplingOptions(Protocol):
    """What the command line's namespace has of it."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int | None


def sampling_of(options: SamplingOptions) -> Sampling:
    """Return how to draw."""
    return Sampling(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
    )
