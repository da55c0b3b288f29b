"""Exact assignment of a dozen experts: depth first, cut by what the CPU and the GPU can still absorb."""

from __future__ import annotations

from .base import Assignment, Task, by_load, evaluate, gpu_order


def improve(task: Task, known: Assignment) -> Assignment:
    """Return the assignment of least makespan, `known` unless a better one exists; slots must be plenty.

    Link order is falling load (Johnson's rule for equal transfer times) and the GPU takes experts as they
    become ready, so only the split between CPU and GPU is searched.
    """
    loads, cost = task.loads, task.cost
    gpu_table = cost.gpu_expert_s
    if not task.arrival_s and len({gpu_table[load] for load in loads.values()}) == 1:
        return known
    if len({*loads.values()}) == 1:
        return known
    return _Search(task, known).run()


class _Search:
    """One depth-first search; held experts first, then missing ones in link order."""

    def __init__(self, task: Task, known: Assignment) -> None:
        cost, loads = task.cost, task.loads
        self.task, self.best_s, self.best = task, known.makespan_s * (1 - 1e-9), known
        self.held, self.missing = gpu_order(task, task.held), by_load(task, task.missing)
        self.order = self.held + self.missing
        self.cpu = [cost.cpu_expert_s[loads[e]] for e in self.order]
        self.gpu = [cost.gpu_expert_s[loads[e]] for e in self.order]
        self.at = [task.arrival_s.get(e, 0.0) for e in self.held]
        self.found: list[int] | None = None
        self.chosen: list[int] = []

    def run(self) -> Assignment:
        """Return the optimum."""
        self._visit(0, self.task.cost.cpu_call_s, self.task.shared_s, self.task.link_busy_s)
        if self.found is None:
            return self.best
        on_gpu = set(self.found)
        cpu = [e for e in self.order if e not in on_gpu]
        arriving = [e for e in self.missing if e in on_gpu]
        return evaluate(self.task, cpu, [e for e in self.held if e in on_gpu] + arriving, arriving)

    def _visit(self, depth: int, cpu_s: float, gpu_s: float, link_s: float) -> None:
        cost = self.task.cost
        if depth == len(self.order):
            work_s = 0.0 if cpu_s == cost.cpu_call_s else cpu_s
            end_s = max(cost.cpu_end_s(work_s, link_s), gpu_s)
            if end_s < self.best_s:
                self.best_s, self.found = end_s, list(self.chosen)
            return
        if not self._possible(depth, cpu_s, gpu_s, link_s):
            return
        expert_s, num_held = self.gpu[depth], len(self.held)
        if depth < num_held:
            at_s, next_link_s = self.at[depth], link_s
        else:
            at_s = next_link_s = link_s + cost.expert_transfer_s
        next_gpu_s = max(gpu_s, at_s) + expert_s
        if next_gpu_s < self.best_s:
            self.chosen.append(self.order[depth])
            self._visit(depth + 1, cpu_s, next_gpu_s, next_link_s)
            self.chosen.pop()
        if cpu_s + self.cpu[depth] < self.best_s:
            self._visit(depth + 1, cpu_s + self.cpu[depth], gpu_s, link_s)

    def _possible(self, depth: int, cpu_s: float, gpu_s: float, link_s: float) -> bool:
        """Whether the experts from `depth` on could fit at all: the CPU takes what the GPU has no time for."""
        room_s = self.best_s - gpu_s
        rest_s = 0.0
        for _, cpu_one_s, gpu_one_s in sorted(
            [(c / g, c, g) for c, g in zip(self.cpu[depth:], self.gpu[depth:], strict=True)], reverse=True
        ):
            share = min(1.0, max(0.0, room_s / gpu_one_s))
            room_s -= share * gpu_one_s
            rest_s += (1.0 - share) * cpu_one_s
        return cpu_s + rest_s < self.best_s
