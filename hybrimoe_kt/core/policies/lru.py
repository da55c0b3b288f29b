"""Least recently used: the longest unrouted expert loses its slot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hybrimoe_kt.core.types import LayerSpec, Routing

from .base import Policy


class LruPolicy(Policy):
    """Value = the step of the last use; experts of one step rank in the order the router listed them."""

    name = "lru"

    def __init__(self, spec: LayerSpec, **options: Any) -> None:
        super().__init__(spec, **options)
        self._last_use = [-1] * spec.num_experts
        self._clock = 0

    def touch(self, routing: Routing) -> None:
        """Stamp every routed expert; the one listed first (the router's favourite) counts as most recent."""
        self._clock = clock = self._clock + len(routing.loads)
        last_use = self._last_use
        for expert in routing.loads:
            last_use[expert] = clock
            clock -= 1

    def value(self, expert: int) -> float:
        """Return the stamp of the last use, -1 if never."""
        return self._last_use[expert]

    def rank(self, candidates: Sequence[int]) -> list[int]:
        """Return `candidates`, the least recent first."""
        return sorted(candidates, key=self._last_use.__getitem__)
