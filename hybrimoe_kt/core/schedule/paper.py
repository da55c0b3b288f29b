"""The paper's greedy schedule, faithfully (arXiv 2504.05897, section 4.2)."""

from __future__ import annotations

from .base import Assignment, Task, by_load, evaluate
from .scheduler import Scheduler

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
        pending = by_load(task, list(task.arrival_s))
        ready = by_load(task, [e for e in task.held if e not in task.arrival_s] if pending else task.held)
        missing = by_load(task, task.missing)
        head, tail = 0, len(ready) - 1  # ready[head..tail] is not placed yet: GPU from the head, CPU from the tail
        first, last = 0, len(missing) - 1  # nor is missing[first..last]
        landed = 0  # missing[landed..first - 1] is transferred and not computed yet
        cpu_s, gpu_s, link_s = cost.cpu_call_s, task.shared_s, task.link_busy_s
        arrival_s = dict(task.arrival_s)
        cpu: list[int] = []
        gpu: list[int] = []
        ends_s: list[float] = []
        while first <= last or head <= tail or landed < first or pending:
            gpu_next, start_s, load = -1, _NEVER, 0
            if head <= tail:
                gpu_next, start_s = ready[head], gpu_s
                load = loads[gpu_next]
            for expert in (*pending, missing[landed]) if landed < first else pending:
                at_s = max(arrival_s[expert], gpu_s)
                if at_s < start_s or (at_s == start_s and loads[expert] > load):
                    gpu_next, start_s, load = expert, at_s, loads[expert]
            gpu_done_s = start_s + gpu_table[load] if gpu_next >= 0 else _NEVER
            cpu_next, cpu_done_s, link_done_s = -1, _NEVER, _NEVER
            if first <= last:
                cpu_next = missing[last]
                wait = first - num_free
                if wait < 0:
                    link_done_s = link_s + transfer_s
                elif wait < len(ends_s):
                    link_done_s = max(link_s, ends_s[wait]) + transfer_s
            elif head <= tail:
                cpu_next = ready[tail]
            if pending and first > last and (cpu_next < 0 or loads[pending[-1]] <= loads[cpu_next]):
                cpu_next = pending[-1]
            if cpu_next >= 0:
                cpu_done_s = cpu_s + cpu_table[loads[cpu_next]]
            if gpu_done_s <= cpu_done_s and gpu_done_s <= link_done_s:
                gpu_s = gpu_done_s
                gpu.append(gpu_next)
                ends_s.append(gpu_s)
                if head <= tail and gpu_next == ready[head]:
                    head += 1
                elif landed < first and gpu_next == missing[landed]:
                    landed += 1
                else:
                    pending.remove(gpu_next)
            elif cpu_done_s <= link_done_s:
                cpu_s = cpu_done_s
                cpu.append(cpu_next)
                if first <= last:
                    last -= 1
                elif pending and cpu_next == pending[-1]:
                    pending.pop()
                else:
                    tail -= 1
            else:
                link_s = arrival_s[missing[first]] = link_done_s
                first += 1
        return evaluate(task, cpu, gpu, missing[:first])
