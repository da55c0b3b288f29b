"""What an engine decides that options of ours have to follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hybrimoe_kt.config import ExpertOptions
from hybrimoe_kt.errors import ConfigError

__all__ = ["CardUse", "EngineLimits", "auto_cache_bytes"]

_MOST_CHUNK_TOKENS = 65536
_CONTEXTS = 4
"""Requests of full length whose keys and values `cache_size: auto` leaves room for; a choice, not measured."""


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Of one rank."""

    max_batched_tokens: int
    """The longest step, tokens: what a chunk of ours has to hold."""
    rank: int = 0
    num_ranks: int = 1
    """On this machine."""

    def options(self, given: Mapping[str, Any], auto_bytes: Callable[[], int | None] = lambda: None) -> ExpertOptions:
        """The options that a user gave, the rest following the engine; `auto_bytes` tells what "auto" may take.

        It is asked where "auto" is on an accelerator whose memory the engine divides, and None where it is not.
        """
        chunk = min(self.max_batched_tokens, _MOST_CHUNK_TOKENS)
        options = ExpertOptions.from_kwargs({"max_chunk_tokens": chunk, **given})
        size = options.cache_size
        is_auto = size.per_layer is None and size.fraction is None and size.num_bytes is None
        if not is_auto or options.card_bytes or options.accelerator == "none":
            return options
        found = auto_bytes()
        return options if found is None else options.replace({"cache_size": f"{found}B"})


@dataclass(frozen=True, slots=True)
class CardUse:
    """How an engine divides an accelerator's memory, bytes."""

    total: int
    used: int
    """By now, dense weights above all."""
    utilization: float
    """Share of `total` that the engine may take, 0 to 1."""
    step: int
    """Taken by a step of the engine's, an estimate."""
    kv_per_request: int
    """Keys and values of one request of full length."""
    max_requests: int
    kv_given: int | None = None
    """For keys and values, where the user has said it."""


def auto_cache_bytes(card: CardUse) -> int:
    """What `cache_size: auto` may take: what the engine may use, less what is used, a step, and keys and values.

    Engines give all that is left to keys and values, which a cache of experts that took what is free would starve. Room
    is left for four requests of full length, though for no more than half of what there is.
    ConfigError where not even one such request would be left room for.
    """
    left = int(card.total * card.utilization) - card.used - card.step
    one = card.kv_per_request
    if card.kv_given is not None:
        return max(0, left - card.kv_given)
    if left < one:
        raise ConfigError(
            f"{max(0, left)} bytes of the accelerator are left for experts, keys and values, one request of full "
            f"length takes {one}; give the engine more of its memory, or shorter requests"
        )
    wanted = one * min(max(1, card.max_requests), _CONTEXTS)
    return left - max(one, min(wanted, left // 2))
