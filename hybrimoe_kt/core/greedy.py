"""The paper's greedy schedule, faithfully (arXiv 2504.05897, section 4.2)."""

from __future__ import annotations

from collections.abc import Mapping

from hybrimoe_kt.core.scheduler import Assignment, Scheduler, Task, by_load, evaluate

_NEVER = float("inf")


class PaperScheduler(Scheduler):
    """Three timelines; the one that would finish its next expert earliest takes it, until all are placed.

    GPU: experts in a slot, highest load first. CPU: missing experts, lowest load first, then, when none is
    left, held ones, lowest load first. Link: missing experts, highest load first, each joining the GPU's
    queue by load when it lands. A pending expert is held: it waits in the GPU's queue for its arrival. Ties
    go to the GPU, then to the CPU: neither costs a slot.
    """

    name = "paper"

    def assign(self, task: Task) -> Assignment:
        """Return the greedy assignment."""
        cost, loads, num_free = task.cost, task.loads, task.num_free
        cpu_table, gpu_table, transfer_s = cost.cpu_expert_s, cost.gpu_expert_s, cost.expert_transfer_s
        held, missing = by_load(task, task.held), by_load(task, task.missing)
        arrival_s = dict(task.arrival_s)
        first, last = 0, len(missing) - 1  # missing[first..last] is not placed yet
        landed = 0  # missing[landed..first - 1] is transferred and not computed yet
        cpu_s, gpu_s, link_s = cost.cpu_call_s, task.shared_s, task.link_busy_s
        cpu: list[int] = []
        gpu: list[int] = []
        ends_s: list[float] = []
        while first <= last or held or landed < first:
            arriving = missing[landed] if landed < first else -1
            gpu_next, start_s = _gpu_choice(held, arriving, gpu_s, arrival_s, loads)
            gpu_done_s = start_s + gpu_table[loads[gpu_next]] if gpu_next >= 0 else _NEVER
            cpu_next = missing[last] if first <= last else held[-1] if held else -1
            cpu_done_s = cpu_s + cpu_table[loads[cpu_next]] if cpu_next >= 0 else _NEVER
            link_done_s = _NEVER
            if first <= last:
                wait = first - num_free
                if wait < 0:
                    link_done_s = link_s + transfer_s
                elif wait < len(ends_s):
                    link_done_s = max(link_s, ends_s[wait]) + transfer_s
            if gpu_done_s <= cpu_done_s and gpu_done_s <= link_done_s:
                gpu_s = gpu_done_s
                gpu.append(gpu_next)
                ends_s.append(gpu_s)
                if gpu_next == arriving:
                    landed += 1
                else:
                    held.remove(gpu_next)
            elif cpu_done_s <= link_done_s:
                cpu_s = cpu_done_s
                cpu.append(cpu_next)
                if first <= last:
                    last -= 1
                else:
                    held.pop()
            else:
                link_s = link_done_s
                arrival_s[missing[first]] = link_s
                first += 1
        return evaluate(task, cpu, gpu, missing[:first])


def _gpu_choice(
    held: list[int], arriving: int, free_s: float, arrival_s: Mapping[int, float], loads: Mapping[int, int]
) -> tuple[int, float]:
    """Return the expert the GPU takes next and when it can start: the highest load there, else the next to land."""
    best, best_s = -1, _NEVER
    for expert in (*held, arriving) if arrival_s else held[:1]:
        if expert < 0:
            continue
        start_s = max(arrival_s.get(expert, 0.0), free_s)
        if best < 0 or start_s < best_s or (start_s == best_s and loads[expert] > loads[best]):
            best, best_s = expert, start_s
    return best, best_s
