"""Chooses transfers for later layers by predicted gain, fills idle link time, and stops when it does not pay."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from operator import itemgetter

from hybrimoe_kt.core.cache import FREE
from hybrimoe_kt.core.layer_state import LayerState
from hybrimoe_kt.core.schedule.base import Task
from hybrimoe_kt.core.schedule.scheduler import Scheduler
from hybrimoe_kt.core.types import Plan, Routing, Transfer

from .benefit import Ledger

__all__ = ["GAINS", "Prefetcher", "by_load"]

_EXPERT = itemgetter(2)
_MAX_LOADS_TRIED = 3
GAINS = 1.0 - 1e-9
"""A makespan must be so much shorter for a gain to be more than rounding."""


class Prefetcher:
    """Ranks transfers for later layers, and gives up those that turn out to be for nothing."""

    def __init__(self, layers: Mapping[int, LayerState], ledger: Ledger, size: int, *, admits: bool) -> None:
        self._layers, self._ledger, self._size, self._admits = layers, ledger, size, admits
        self._gate, self._admission = ledger.benefit["gate"], ledger.benefit["admission"]

    def choose(
        self, plan: Plan, predictions: Sequence[Routing], scheduler: Scheduler, now_s: float, next_s: float
    ) -> list[Transfer]:
        """Book and return up to `size` transfers while `plan` runs; `next_s` is when the next layer starts.

        For the very next layer a transfer may still be under way when it starts: the simulated gain counts the
        wait. Anything meant for a later one must land before that layer starts.
        """
        result: list[Transfer] = []
        for benefit in (self._gate, self._admission):
            if not benefit.is_on:
                benefit.tick()
        if self._gate.is_on and predictions:
            self._layers[predictions[0].layer].predicted = predictions[0].loads.keys()
            start_s = next_s
            for ahead, routing in enumerate(predictions[: self._num_lacking(predictions)]):
                if len(result) >= self._size:
                    break
                by_s = start_s if ahead else float("inf")
                start_s += self._fill(routing, scheduler, now_s, start_s, by_s, result)
                start_s += self._layers[routing.layer].cost.between_layers_s[routing.num_tokens]
        if self._admits and self._admission.is_on and plan.cpu and len(result) < self._size:
            self._admit(plan, now_s, next_s, result)
        return result

    def abort(self, state: LayerState, unwanted: Collection[int], now_s: float) -> list[Transfer]:
        """Give up and return those prefetches for `state`'s layer that the link has not started."""
        if not unwanted or state.link.free_s <= now_s:
            return []
        layer = state.spec.layer
        dropped, moved = state.link.abort(now_s, lambda t: t.expert.layer == layer and t.expert.index in unwanted)
        for transfer in dropped:
            state.cache.release(transfer.expert.index)
            state.forget(transfer.expert.index)
            self._ledger.aborted(state)
        for entry in moved:
            expert = entry.transfer.expert
            self._layers[expert.layer].cache.reschedule(expert.index, entry.end_s)
        return dropped

    def _num_lacking(self, predictions: Sequence[Routing]) -> int:
        """How many predictions there are up to the last of which an expert is missing."""
        for number in range(len(predictions), 0, -1):
            routing = predictions[number - 1]
            if FREE in map(self._layers[routing.layer].cache.slot_of.__getitem__, routing.loads):
                return number
        return 0

    def _fill(
        self,
        routing: Routing,
        scheduler: Scheduler,
        now_s: float,
        start_s: float,
        by_s: float,
        result: list[Transfer],
    ) -> float:
        """Append the transfers that most lower one later layer's makespan; return that makespan."""
        state = self._layers[routing.layer]
        if not state.uses_gpu:
            return state.cost.cpu_s(routing.loads.values())
        task = state.task(routing.loads, routing.num_tokens, now_s, start_s)
        makespan_s = scheduler.makespan_s(task)
        candidates = by_load(routing, task.missing) if task.missing else []
        while candidates and len(result) < self._size:
            end_s = max(now_s, state.link.free_s) + state.cost.expert_transfer_s
            if end_s > by_s:
                break
            best, best_s = -1, makespan_s * GAINS
            for expert in candidates[:1] if routing.num_tokens == 1 else _one_per_load(candidates, routing.loads):
                after_s = scheduler.makespan_s(_with(task, expert, end_s - start_s))
                if after_s < best_s:
                    best, best_s = expert, after_s
            if best < 0 or not self._start(state, best, routing.loads, now_s, "gate", result):
                break
            candidates.remove(best)
            makespan_s = best_s
            if candidates and len(result) < self._size:
                task = _with(task, best, end_s - start_s)
        return makespan_s

    def _admit(self, plan: Plan, now_s: float, by_s: float, result: list[Transfer]) -> None:
        """Use what is left of the link's idle time to keep experts the CPU had to compute, if worth a slot."""
        state = self._layers[plan.layer]
        transfer_s = state.cost.expert_transfer_s
        if not state.uses_gpu or state.is_streaming or max(now_s, state.link.free_s) + transfer_s > by_s:
            return
        slot_of, value = state.cache.slot_of, state.policy.value
        absent = [e for e in plan.cpu if slot_of[e] == FREE]
        if len(absent) > 1:
            absent.sort()
            absent.sort(key=value, reverse=True)  # of equal values the lowest number
        for expert in absent[: self._size - len(result)]:
            end_s = max(now_s, state.link.free_s) + transfer_s
            if end_s > by_s or not self._start(state, expert, (), now_s, "admission", result):
                return

    def _start(
        self,
        state: LayerState,
        expert: int,
        protected: Collection[int],
        now_s: float,
        why: str,
        result: list[Transfer],
    ) -> bool:
        """Give `expert` a free slot or the policy's first victim's; False if none may go."""
        cache = state.cache
        free = cache.free_slots() if FREE in cache.occupant else []
        if free:
            slot = free[0]
        else:
            candidates = cache.evictable(protected)
            if not candidates:
                return False
            victim = state.policy.first(candidates)
            if why == "admission" and not state.policy.admits(expert, victim):
                return False
            slot = cache.slot_of[victim]
            state.displace(victim, why)
            self._ledger.lost(state, victim)
        result.append(state.prefetch(expert, slot, now_s, why))
        self._ledger.started(state)
        return True


def by_load(routing: Routing, missing: Sequence[int]) -> list[int]:
    """Return `missing`, the highest load first, of equal loads the most probable."""
    loads, scores = routing.loads, routing.scores
    if len(missing) < 2:
        return list(missing)
    if scores is None:
        return sorted(missing, key=loads.__getitem__, reverse=True)
    ranked = sorted([(-loads[e], -scores[e], e) for e in missing])
    return list(map(_EXPERT, ranked))


def _one_per_load(candidates: Sequence[int], loads: Mapping[int, int]) -> list[int]:
    """Return the first candidate of each of the highest loads: experts of one load gain the same."""
    first: dict[int, int] = {}
    for expert in candidates:
        first.setdefault(loads[expert], expert)
        if len(first) == _MAX_LOADS_TRIED:
            break
    return list(first.values())


def _with(task: Task, expert: int, arrival_s: float) -> Task:
    """Return `task` with `expert` on its way, landing `arrival_s` after the step starts."""
    missing = task.missing.copy()
    missing.remove(expert)
    return Task(
        task.cost,
        task.loads,
        [*task.held, expert],
        missing,
        task.layer,
        {**task.arrival_s, expert: arrival_s} if arrival_s > 0 else task.arrival_s,
        max(task.link_busy_s, arrival_s),
        task.shared_s,
        max(0, task.num_free - 1),
        task.load,
    )
