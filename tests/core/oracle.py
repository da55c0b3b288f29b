"""Exact optima to hold the schedulers against: exhaustive, with link order, and by integer programming."""

from __future__ import annotations

from itertools import permutations

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from hybrimoe_kt.core.schedule.base import Task, evaluate, gpu_order


def exhaustive(task: Task, *, all_link_orders: bool = False) -> float:
    """Return the least makespan over every split of the experts and, if asked, every order on the link."""
    held, missing = task.held, task.missing
    best = float("inf")
    for mask in range(1 << (len(held) + len(missing))):
        on_gpu = [e for bit, e in enumerate(held) if mask >> bit & 1]
        moved = [e for bit, e in enumerate(missing, len(held)) if mask >> bit & 1]
        cpu = [e for e in (*held, *missing) if e not in on_gpu and e not in moved]
        orders = permutations(moved) if all_link_orders else [sorted(moved, key=lambda e: -task.loads[e])]
        for order in orders:
            best = min(best, evaluate(task, cpu, gpu_order(task, on_gpu) + list(order), list(order)).makespan_s)
    return best


def depth_first(task: Task) -> float:
    """Return the least makespan over every split, link order by falling load; fast enough for a dozen experts."""
    cost, loads = task.cost, task.loads
    held, missing = gpu_order(task, task.held), sorted(task.missing, key=lambda e: -loads[e])
    experts, best = held + missing, float("inf")
    stack = [(0, 0.0, task.shared_s, task.link_busy_s)]
    while stack:
        depth, cpu_s, gpu_s, link_s = stack.pop()
        if depth == len(experts):
            work_s = cpu_s + cost.cpu_call_s if cpu_s else 0.0
            best = min(best, max(cost.cpu_end_s(work_s, link_s), gpu_s))
            continue
        expert = experts[depth]
        next_link_s = link_s + (cost.expert_transfer_s if depth >= len(held) else 0.0)
        at_s = next_link_s if depth >= len(held) else task.arrival_s.get(expert, 0.0)
        next_gpu_s = max(gpu_s, at_s) + cost.gpu_s(loads[expert])
        if next_gpu_s < best:
            stack.append((depth + 1, cpu_s, next_gpu_s, next_link_s))
        next_cpu_s = cpu_s + cost.cpu_expert_s[loads[expert]]
        if next_cpu_s + cost.cpu_call_s < best:
            stack.append((depth + 1, next_cpu_s, gpu_s, link_s))
    return best


def can_be_beaten(task: Task, makespan_s: float, time_limit_s: float = 0.4) -> bool | None:
    """Return whether any schedule ends within `makespan_s`; None if not decided in time. No contention, no pending.

    An integer program: z[e] = 1 puts expert e on the GPU, u = 1 makes a CPU call, M is the makespan. M >= the CPU's
    sum; M >= all GPU work; for every k, M >= the landing of the k-th missing expert + the GPU work from it on.
    """
    cost, loads = task.cost, task.loads
    assert cost.cpu_slowdown == 1.0, "the program is linear"
    assert not task.arrival_s, "the program knows residents only"
    experts = task.held + sorted(task.missing, key=lambda e: -loads[e])
    n, num_held, unit = len(experts), len(task.held), makespan_s
    cpu = np.array([cost.cpu_expert_s[loads[e]] for e in experts]) / unit
    gpu = np.array([cost.gpu_s(loads[e]) for e in experts]) / unit
    rows = [np.r_[cpu, -cost.cpu_call_s / unit, 1.0], np.r_[-gpu, 0.0, 1.0], np.r_[np.ones(n), float(n), 0.0]]
    low = [cpu.sum(), task.shared_s / unit, float(n)]
    for k in range(num_held, n):
        row = np.r_[np.zeros(n + 1), 1.0]
        row[num_held : k + 1] -= cost.expert_transfer_s / unit
        row[k:n] -= gpu[k:]
        row[k] -= task.link_busy_s / unit
        rows.append(row)
        low.append(0.0)
    result = milp(
        np.r_[np.zeros(n + 1), 1.0],
        integrality=np.r_[np.ones(n + 1), 0.0],
        bounds=Bounds(np.zeros(n + 2), np.ones(n + 2)),
        constraints=LinearConstraint(np.array(rows), np.array(low), np.inf),
        options={"time_limit": time_limit_s},
    )
    return {0: True, 2: False}.get(result.status)
