"""Which slot each of a plan's transfers takes."""

from __future__ import annotations

from heapq import heappop, heappush

from .cache import FREE
from .layer_state import LayerState
from .schedule.base import Assignment, Task
from .types import Transfer


def allocate(
    state: LayerState, task: Task, assignment: Assignment, now_s: float
) -> tuple[list[Transfer], dict[int, int]]:
    """Give every transfer a slot, put it on the link, and return the transfers and `gpu`'s expert -> slot.

    Free slots first, then the policy's victims outside the plan, then slots whose expert the plan is through
    with: the least valuable of those the link need not wait for, else the next to leave the GPU. Times are
    those of `evaluate`.
    """
    cache, num = state.cache, len(assignment.transfers)
    ready = cache.free_slots()[:num] if FREE in cache.occupant else []
    if len(ready) < num:
        in_use = set(assignment.gpu)
        in_use.difference_update(assignment.transfers)
        victims = state.policy.rank(cache.evictable(in_use))
        ready += [cache.slot_of[e] for e in victims[: num - len(ready)]]
    if len(ready) < num:
        return _hand_on(state, task, assignment, ready, now_s)
    transfers = [state.send(e, slot, now_s, "on_demand") for e, slot in zip(assignment.transfers, ready, strict=True)]
    slot_of = cache.slot_of
    return transfers, {e: slot_of[e] for e in assignment.gpu}


def _hand_on(
    state: LayerState, task: Task, assignment: Assignment, ready: list[int], now_s: float
) -> tuple[list[Transfer], dict[int, int]]:
    """Walk the GPU's order, handing slots on: more transfers than slots that could be had at once."""
    cache, link, gpu_table = state.cache, state.link, state.cost.gpu_expert_s
    rank = {e: position for position, e in enumerate(state.policy.rank(list(assignment.gpu)))}
    arriving = set(assignment.transfers)
    left: list[tuple[float, int]] = []  # (when the GPU is through with it, expert), in GPU order
    num_left = 0  # left[:num_left] could be overwritten without waiting, and is in `idle` unless it has been
    idle: list[tuple[int, int]] = []  # (rank, slot)
    gpu_end_s = now_s + task.shared_s
    slots: dict[int, int] = {}
    transfers = []
    ready.reverse()
    for expert in assignment.gpu:
        if expert in arriving:
            start_s = max(now_s, link.free_s)
            while num_left < len(left) and (left[num_left][0] <= start_s or not (ready or idle)):
                end_s, old = left[num_left]
                start_s = max(start_s, end_s)
                heappush(idle, (rank[old], slots[old]))
                num_left += 1
            slot = ready.pop() if ready else heappop(idle)[1]
            transfers.append(state.send(expert, slot, start_s, "on_demand"))
            arrival_s = link.free_s
        else:
            slot, arrival_s = cache.slot_of[expert], cache.arrival_s.get(expert, 0.0)
        slots[expert] = slot
        gpu_end_s = max(gpu_end_s, arrival_s) + gpu_table[task.loads[expert]]
        left.append((gpu_end_s, expert))
    return transfers, slots
