"""Frequency policies: least frequently used, and frequency over recency."""

from __future__ import annotations

from typing import Any

from hybrimoe_kt.core.types import LayerSpec, Routing

from .base import Policy


class LfuPolicy(Policy):
    """Value = the number of tokens ever routed to the expert; ties go to the more recent."""

    name = "lfu"

    def __init__(self, spec: LayerSpec, **options: Any) -> None:
        super().__init__(spec, **options)
        self._count = [0.0] * spec.num_experts
        self._last_use = [0] * spec.num_experts

    def touch(self, routing: Routing) -> None:
        """Count every routed token."""
        self.step += 1
        count, last_use, step = self._count, self._last_use, self.step
        for expert, load in routing.loads.items():
            count[expert] += load
            last_use[expert] = step

    def value(self, expert: int) -> float:
        """Return the count, with the last use's step behind the decimal point."""
        return self._count[expert] + self._last_use[expert] * 1e-9


class LfruPolicy(LfuPolicy):
    """Value = frequency over steps since the last use (LFRU)."""

    name = "lfru"

    def value(self, expert: int) -> float:
        """Return count / age; an expert of this very step has age 1."""
        return self._count[expert] / (self.step + 1 - self._last_use[expert])


class LeastStalePolicy(LfuPolicy):
    """Least-Stale (SpecMD): experts not used since the previous step go first, among them the least frequent.

    Consecutive tokens share experts, so what this or the last step used is fresh; the rest is stale and
    ranks by frequency alone.
    """

    name = "least_stale"
    options = {"fresh_steps": 1}  # noqa: RUF012

    def value(self, expert: int) -> float:
        """Return the frequency, lifted above every stale expert while fresh."""
        is_fresh = self.step - self._last_use[expert] <= self.option["fresh_steps"] and self._count[expert] > 0
        return self._count[expert] + self._last_use[expert] * 1e-9 + (1e12 if is_fresh else 0.0)
