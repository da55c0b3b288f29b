"""The policies others use, and the offline bound: recency, frequency, both, a fixed ranking, and the future."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

from hybrimoe_kt.core.types import LayerSpec, Routing
from hybrimoe_kt.errors import ConfigError

from .base import Policy


class LruPolicy(Policy):
    """Value = the step of the last use; experts of one step rank in the order the router listed them."""

    name = "lru"
    reads_scores = False

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

    @property
    def clock(self) -> int:
        """Of the stamps."""
        return self._clock

    def standing(self) -> list[int]:
        """Stamps; 0 for what was never used."""
        return [max(0, stamp) for stamp in self._last_use]

    def resume(self, standing: Sequence[int], clock: int) -> None:
        """Take the stamps as they are."""
        self._last_use, self._clock = [stamp or -1 for stamp in standing], clock


class LfuPolicy(Policy):
    """Value = the number of tokens ever routed to the expert; ties go to the more recent."""

    name = "lfu"
    reads_scores = False

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


class StaticFrequencyPolicy(Policy):
    """Value = a frequency known beforehand, never updated; without one, lower indices are worth more.

    `frequencies` maps layer -> a number per expert. A transfer is admitted past its step only where the
    table says so; with a full cache of the most frequent experts that is never.
    """

    name = "static_frequency"
    reads_scores = False
    options = {"frequencies": None}  # noqa: RUF012

    def __init__(self, spec: LayerSpec, **options: Any) -> None:
        super().__init__(spec, **options)
        given: Mapping[int, Sequence[float]] = self.option["frequencies"] or {}
        self._table = list(given.get(spec.layer, [-float(e) for e in range(spec.num_experts)]))

    def touch(self, routing: Routing) -> None:
        """Learn nothing."""

    def value(self, expert: int) -> float:
        """Return the expert's fixed frequency."""
        return self._table[expert]


class BeladyPolicy(Policy):
    """Value = minus the step of the next use. `future` maps layer -> the experts of each step, from the first on."""

    name = "belady"
    reads_scores = False
    options = {"future": None}  # noqa: RUF012

    def __init__(self, spec: LayerSpec, **options: Any) -> None:
        super().__init__(spec, **options)
        future: Mapping[int, Sequence[Sequence[int]]] | None = self.option["future"]
        if future is None or spec.layer not in future:
            raise ConfigError(f"policy belady: option future lacks layer {spec.layer}; it needs the whole trace")
        self._uses: list[list[int]] = [[] for _ in range(spec.num_experts)]
        for step, experts in enumerate(future[spec.layer]):
            for expert in experts:
                self._uses[expert].append(step)
        self._horizon = len(future[spec.layer]) + 1

    def touch(self, routing: Routing) -> None:
        """Move one step on."""
        self.step += 1

    def value(self, expert: int) -> float:
        """Return minus the next step that needs the expert; one that never returns is worth least."""
        uses = self._uses[expert]
        position = bisect_right(uses, self.step - 1)
        return -float(uses[position] if position < len(uses) else self._horizon)
