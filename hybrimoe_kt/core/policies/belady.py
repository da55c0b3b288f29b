"""The offline bound: evict what is needed last."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

from hybrimoe_kt.core.types import LayerSpec, Routing
from hybrimoe_kt.errors import ConfigError

from .base import Policy


class BeladyPolicy(Policy):
    """Value = minus the step of the next use. `future` maps layer -> the experts of each step, from the first on."""

    name = "belady"
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
