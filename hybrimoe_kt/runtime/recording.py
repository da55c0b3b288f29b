"""How routing is handed to whoever records it."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from hybrimoe_kt.core.types import Routing
from hybrimoe_kt.device.readback import Guesses

__all__ = ["RoutingRecorder", "halved", "record"]


class RoutingRecorder(Protocol):
    """Takes every layer's routing as it happens; the simulator's recorder is one.

    While one listens, probabilities are rounded to half precision before anything is decided by them, and gates are
    asked for guesses even where nothing could be prefetched.
    """

    def record(
        self,
        layer: int,
        experts: Any,
        weights: Any,
        scores: Any,
        predicted: Any,
        predicted_scores: Any,
        token_scores: Any,
    ) -> None:
        """Experts and weights `[num_tokens, top_k]`, scores `[1, num_experts]`, predictions with a depth in front;
        token_scores `[num_tokens, num_experts]`."""


def halved(probabilities: torch.Tensor) -> torch.Tensor:
    """As a recording keeps them: a replay then decides on the very same numbers."""
    return probabilities.half().float()


def record(
    recorder: RoutingRecorder,
    routing: Routing,
    ids: torch.Tensor,
    weights: torch.Tensor,
    logits: torch.Tensor | None,
    guesses: Guesses | None,
) -> None:
    """Hand over one layer step: `ids`, `weights [num_tokens, top_k]`, `logits [num_tokens, num_experts]`.

    Scores go in averaged, as decisions saw them.
    """
    recorder.record(
        routing.layer,
        ids.numpy(),
        weights.numpy(),
        None if routing.scores is None else [routing.scores],
        None if guesses is None else guesses.ids.cpu().numpy(),
        None if guesses is None else halved(guesses.scores)[:, None].cpu().numpy(),
        None if logits is None else torch.softmax(logits.float(), dim=-1).cpu().numpy(),
    )
