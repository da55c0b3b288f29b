"""A lower bound on the time of any schedule: what no policy, predictor or plan can beat on a given trace and machine.

An expert computed on the GPU was either kept in a slot since its layer's previous use of it, or transferred. At most H
can be kept (Belady with bypass, which is optimal for that count, starting from whatever contents are best), and at most
T / transfer time can be transferred within a total time T. So G <= H + T / transfer. Given G, time is least when the G
moves from CPU to GPU go where they save most; per layer the time is bounded by a convex function of its share of G, so
taking the largest savings first is exact. The bound is the least T consistent with itself. Left out, each in its
favour: slowdown under contention, waiting for arrivals, slots needed while computing, which experts go where.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

import numpy as np

from hybrimoe_kt.core.cost import CostModel
from hybrimoe_kt.core.types import Routing

from .trace import Phase, Trace

_PRECISION = 1e-12


def lower_bound(
    trace: Trace, phase: Phase, num_slots: int, costs: Mapping[int, CostModel], *, warmup: int = 0, num_links: int = 1
) -> float:
    """Return seconds per step of `phase` below which no schedule can go; steps before `warmup` are free."""
    steps = [step for step in trace.phase_steps(phase) if step.index >= warmup]
    if not steps:
        return float("nan")
    base_s, savings_s, kept = 0.0, [], 0
    for position, layer in enumerate(trace.layers):
        routings = [trace.routing(step, position) for step in steps]
        kept += most_kept([list(routing.loads) for routing in routings], num_slots)
        for routing in routings:
            curve = _curve(costs[layer], routing)
            base_s += curve[0] + costs[layer].between_layers_s[routing.num_tokens]
            savings_s += [before - after for before, after in pairwise(curve) if before > after]
    total_s = np.concatenate([[base_s], base_s - np.cumsum(-np.sort(-np.array(savings_s)))])
    per_s = num_links / min(costs[layer].expert_transfer_s for layer in trace.layers)
    return _crossing(total_s.tolist(), kept, per_s) / len(steps)


def most_kept(uses: Sequence[Sequence[int]], num_slots: int) -> int:
    """Return how many uses can at most find their expert still in a slot from its previous use, or from the start."""
    following: list[dict[int, int]] = []
    seen: dict[int, int] = {}
    for step in range(len(uses) - 1, -1, -1):
        following.append({expert: seen[expert] for expert in uses[step] if expert in seen})
        seen.update(dict.fromkeys(uses[step], step))
    following.reverse()
    kept = dict(sorted(seen.items(), key=lambda item: item[1])[:num_slots])
    count = 0
    for step, experts in enumerate(uses):
        for expert in experts:
            count += kept.pop(expert, None) is not None
        kept.update(following[step])
        # Optimal for counting kept intervals: drop the ones that end last.
        for expert in sorted(kept, key=lambda e: kept[e], reverse=True)[: max(0, len(kept) - num_slots)]:
            del kept[expert]
    return count


def _curve(cost: CostModel, routing: Routing) -> list[float]:
    """Return a convex lower bound of the layer's seconds with 0, 1, 2, ... of its experts on the GPU.

    For each number it takes the cheapest experts on both sides; the convex hull from below makes it convex.
    """
    loads = list(routing.loads.values())
    on_cpu = [0.0, *accumulate(sorted(cost.cpu_expert_s[load] for load in loads))]
    if not cost.has_gpu:
        return [on_cpu[-1] + cost.cpu_call_s]
    on_gpu = accumulate(sorted(cost.gpu_s(load) for load in loads), initial=cost.shared_s[routing.num_tokens])
    called = [work_s + cost.cpu_call_s if work_s else 0.0 for work_s in reversed(on_cpu)]
    return _hull([max(gpu, cpu) for gpu, cpu in zip(on_gpu, called, strict=True)])


def _hull(values: Sequence[float]) -> list[float]:
    """Return the largest convex sequence that is nowhere above `values`."""
    corners: list[int] = []
    for right, value in enumerate(values):
        while len(corners) > 1:
            left, middle = corners[-2:]
            if (values[middle] - values[left]) * (right - left) < (value - values[left]) * (middle - left):
                break
            corners.pop()
        corners.append(right)
    result: list[float] = []
    for left, right in pairwise(corners):
        slope = (values[right] - values[left]) / (right - left)
        result += [values[left] + slope * step for step in range(right - left)]
    return [*result, values[-1]]


def _crossing(total_s: list[float], kept: int, transfers_per_s: float) -> float:
    """Return the least T with T >= total(kept + T * transfers_per_s), to 1e-12 from below; the right side falls."""

    def needed_s(time_s: float) -> float:
        return total_s[min(len(total_s) - 1, kept + int(time_s * transfers_per_s))]

    low_s, high_s = total_s[-1], total_s[0]
    if needed_s(low_s) <= low_s:
        return low_s
    while high_s - low_s > _PRECISION * high_s:
        middle_s = (low_s + high_s) / 2
        if needed_s(middle_s) <= middle_s:
            high_s = middle_s
        else:
            low_s = middle_s
    return low_s
