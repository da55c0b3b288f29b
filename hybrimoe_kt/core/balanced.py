"""Our schedule: the best threshold assignment, then refined."""

from __future__ import annotations

from itertools import accumulate

from hybrimoe_kt.core.scheduler import Assignment, Scheduler, Task, evaluate, gpu_order


class BalancedScheduler(Scheduler):
    """Minimal makespan among assignments that transfer the x highest loads and take the y lowest held to the CPU.

    For equal loads this is the optimum: experts of one kind are then interchangeable. Every assignment the
    paper's greedy can reach is of this form.
    """

    name = "balanced"

    def assign(self, task: Task) -> Assignment:
        """Return the best assignment of that form."""
        cost, loads, arrival_s = task.cost, task.loads, task.arrival_s
        cpu_table, gpu_table, transfer_s = cost.cpu_expert_s, cost.gpu_expert_s, cost.expert_transfer_s
        load_of = loads.__getitem__
        missing = sorted(task.missing, key=load_of, reverse=True)
        # y of these go to the CPU: lowest load first, of equal loads the one that lands last
        held = sorted(task.held, key=load_of)
        if arrival_s:
            held.sort(key=lambda e: (loads[e], -arrival_s.get(e, 0.0)))
        num_held, num_missing = len(held), len(missing)
        cpu_missing = [0.0, *accumulate([cpu_table[loads[e]] for e in reversed(missing)])]
        cpu_held = [0.0, *accumulate([cpu_table[loads[e]] for e in held])]
        gpu_held = self._gpu_ends(task, held)
        max_x = num_missing if task.num_free + num_held else 0
        best_s, best_x, best_y = float("inf"), 0, 0
        moved_s, landed_s, link_s, y = 0.0, 0.0, task.link_busy_s, 0
        call_s = cost.cpu_call_s
        for x in range(max_x + 1):
            if x:
                gpu_s = gpu_table[loads[missing[x - 1]]]
                link_s += transfer_s
                moved_s += gpu_s
                landed_s = max(landed_s, link_s) + gpu_s
                if landed_s >= best_s:
                    break
            rest_s = cpu_missing[num_missing - x]
            while True:
                work_s = rest_s + cpu_held[y]
                cpu_s = cost.cpu_end_s(work_s + call_s, link_s) if work_s else 0.0
                gpu_end_s = max(gpu_held[y] + moved_s, landed_s)
                end_s = max(cpu_s, gpu_end_s)
                if end_s < best_s:
                    best_s, best_x, best_y = end_s, x, y
                if cpu_s >= gpu_end_s or y == num_held:
                    break
                y += 1
            if y:
                y -= 1
        arriving = missing[:best_x]
        gpu = gpu_order(task, held[best_y:]) + arriving
        return evaluate(task, missing[best_x:] + held[:best_y], gpu, arriving)

    @staticmethod
    def _gpu_ends(task: Task, held: list[int]) -> list[float]:
        """When the GPU would be through with held[y:] alone, for every y."""
        cost, loads, arrival_s = task.cost, task.loads, task.arrival_s
        gpu_table = cost.gpu_expert_s
        if not arrival_s:
            ends = [task.shared_s, *accumulate([gpu_table[loads[e]] for e in reversed(held)], initial=task.shared_s)]
            return ends[:0:-1]
        result = []
        for y in range(len(held) + 1):
            end_s = task.shared_s
            for expert in gpu_order(task, held[y:]):
                end_s = max(end_s, arrival_s.get(expert, 0.0)) + gpu_table[loads[expert]]
            result.append(end_s)
        return result
