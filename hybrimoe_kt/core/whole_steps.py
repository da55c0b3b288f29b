"""Steps that decide nothing: of a layer whose every expert stands in a slot, and of one that has no slots."""

from __future__ import annotations

from collections.abc import Mapping

from .cost import CostModel
from .layer_state import LayerState
from .schedule.base import Assignment, Task, without_slots
from .schedule.scheduler import Scheduler

_MOST_KNOWN = 64
"""Prompts end in steps of any length."""


class WholeSteps:
    """What a scheduler says of layers that stand in slots as a whole, remembered by layer kind and length."""

    def __init__(self) -> None:
        self._known: dict[tuple[Scheduler, CostModel, int, int], Assignment] = {}

    def of(self, scheduler: Scheduler, state: LayerState, num_tokens: int) -> Assignment:
        """The assignment of a step whose tokens spread evenly over as many experts as they can."""
        key = scheduler, state.cost, state.spec.num_experts, num_tokens
        known = self._known.get(key)
        if known is None:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            routed = num_tokens * state.spec.top_k
            used = min(state.spec.num_experts, routed)
            loads = dict.fromkeys(range(used), -(-routed // used))
            shared_s = state.cost.shared_s[num_tokens]
            task = Task(state.cost, loads, list(loads), [], layer=state.spec.layer, shared_s=shared_s, num_free=0)
            known = self._known[key] = scheduler.assign(task)
        return known


class CpuSteps:
    """What steps are predicted to take where the CPU computes everything; remembered of single tokens."""

    def __init__(self) -> None:
        self._known: dict[tuple[CostModel, int], Assignment] = {}

    def of(self, cost: CostModel, loads: Mapping[int, int], num_tokens: int) -> Assignment:
        """The assignment of a step; of one token's the seconds alone, which depend on no expert's number."""
        if num_tokens > 1:
            return without_slots(cost, loads)
        key = cost, len(loads)
        known = self._known.get(key)
        if known is None:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            known = self._known[key] = without_slots(cost, loads)
        return known
