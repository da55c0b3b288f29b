"""Our schedule: exact where it can be, otherwise the best threshold assignment."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from hybrimoe_kt.core.branch_bound import improve
from hybrimoe_kt.core.greedy import PaperScheduler
from hybrimoe_kt.core.scheduler import Assignment, Scheduler, Task, evaluate, gpu_order

_NEVER = float("inf")
_MAX_REMEMBERED = 4096

Choice = tuple[int, int, float, float, float, float]
"""x, y, then makespan, CPU end, GPU busy and link busy seconds."""


class BalancedScheduler(Scheduler):
    """Minimal makespan; transfers the x highest missing loads and leaves the y lowest held loads to the CPU.

    Every assignment the paper's greedy can reach is of this form, so none of its is better. The best of the
    form is the optimum when all experts cost the GPU the same (then only x, y and the CPU's sum matter); for
    other inputs of at most `exact_experts` experts a branch and bound closes the gap. With
    `admission_value_s` on the task, an admitted expert's future value is weighed against the makespan.
    """

    name = "balanced"
    options = {"exact_experts": 12}  # noqa: RUF012

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self._paper = PaperScheduler()
        self._exact_experts = int(self.option["exact_experts"])
        self._remembered: dict[tuple[object, ...], Choice] = {}

    def assign(self, task: Task) -> Assignment:
        """Return the best assignment found; the same task gives the same answer."""
        num_missing = len(task.missing)
        loads = task.loads
        if not task.arrival_s and task.num_free >= num_missing and len(set(loads.values())) == 1:
            return self._assign_equal(task)
        held, missing = _held_order(task), sorted(task.missing, key=loads.__getitem__, reverse=True)
        x, y, *times = _best_threshold(task, held, missing)
        if x > task.num_free:
            return self._within_slots(task, held, missing, x, y)
        result = _assignment(task, held, missing, x, y, times)
        if len(held) + num_missing <= self._exact_experts and task.num_free >= num_missing:
            result = improve(task, result)
        return result

    def _assign_equal(self, task: Task) -> Assignment:
        """All loads equal, nothing pending, slots to spare: only the numbers of experts matter."""
        held, missing = task.held, task.missing
        load = task.loads[held[0] if held else missing[0]]
        key = (id(task.cost), load, len(held), len(missing), task.link_busy_s, task.shared_s, task.admission_value_s)
        choice = self._remembered.get(key)
        if choice is None:
            if len(self._remembered) >= _MAX_REMEMBERED:
                self._remembered.clear()
            choice = self._remembered[key] = _best_threshold(task, held, missing)
        x, y, *times = choice
        arriving = missing[:x]
        return Assignment(missing[x:] + held[:y], held[y:] + arriving, arriving, *times)

    def _within_slots(self, task: Task, held: list[int], missing: list[int], x: int, y: int) -> Assignment:
        """Transfers must reuse slots of this very plan, which delays them: search around the free optimum."""
        best = self._paper.assign(task)
        for num_moved in {x, *range(task.num_free, x, max(1, (x - task.num_free) // 8))}:
            for num_left in {0, y}:
                arriving = missing[:num_moved]
                if arriving and len(held) - num_left + task.num_free == 0:
                    continue
                gpu = gpu_order(task, held[num_left:]) + arriving
                other = evaluate(task, missing[num_moved:] + held[:num_left], gpu, arriving)
                if other.makespan_s < best.makespan_s:
                    best = other
        return best


def _held_order(task: Task) -> list[int]:
    """Return the held experts, the first to leave to the CPU first: lowest load, of equal loads the last to land."""
    loads, arrival_s = task.loads, task.arrival_s
    if not arrival_s:
        return sorted(task.held, key=loads.__getitem__)
    return sorted(task.held, key=lambda e: (loads[e], -arrival_s.get(e, 0.0)))


def _best_threshold(task: Task, held: Sequence[int], missing: Sequence[int]) -> Choice:
    """Return the best x and y, as if slots were plenty: for each x the y where CPU and GPU end together."""
    cost, loads = task.cost, task.loads
    cpu_table, gpu_table, transfer_s = cost.cpu_expert_s, cost.gpu_expert_s, cost.expert_transfer_s
    call_s, slowdown, value_s = cost.cpu_call_s, cost.cpu_slowdown, task.admission_value_s
    last = 1.0 / cost.transfer_parts
    ahead_s = transfer_s * (1.0 - last)
    num_held, num_missing = len(held), len(missing)
    rest = list(accumulate([cpu_table[loads[e]] for e in reversed(missing)], initial=call_s))
    left = list(accumulate([cpu_table[loads[e]] for e in held], initial=0.0))
    gpu_held = _gpu_ends(task, held)
    moved_s, landed_s, link_s, y = 0.0, 0.0, task.link_busy_s, 0
    best, best_s = (0, 0, 0.0, 0.0), _NEVER
    for x in range(num_missing + 1 if task.num_free + num_held else 1):
        if x:
            expert_s = gpu_table[loads[missing[x - 1]]]
            link_s += transfer_s
            moved_s += expert_s
            landed_s = max(landed_s + expert_s, link_s - ahead_s + expert_s, link_s + expert_s * last)
            if landed_s - value_s * num_missing >= best_s:
                break
        rest_s = rest[num_missing - x]
        direction = 0
        while True:
            cpu_s = rest_s + left[y]
            if cpu_s == call_s:
                cpu_s = 0.0
            elif slowdown != 1.0:
                stretched_s = cpu_s * slowdown
                cpu_s = stretched_s if stretched_s <= link_s else cpu_s + link_s * (1.0 - 1.0 / slowdown)
            gpu_s = gpu_held[y] + moved_s
            if landed_s > gpu_s:
                gpu_s = landed_s
            end_s = (cpu_s if cpu_s > gpu_s else gpu_s) - value_s * x
            if end_s < best_s:
                best_s, best = end_s, (x, y, cpu_s, gpu_s)
            if cpu_s < gpu_s:
                if direction < 0 or y == num_held:
                    break
                direction, y = 1, y + 1
            else:
                if direction > 0 or y == 0:
                    break
                direction, y = -1, y - 1
    x, y, cpu_s, gpu_s = best
    busy_s = task.shared_s + sum([gpu_table[loads[e]] for e in held[y:]] + [gpu_table[loads[e]] for e in missing[:x]])
    return x, y, max(cpu_s, gpu_s), cpu_s, busy_s, transfer_s * x


def _gpu_ends(task: Task, held: Sequence[int]) -> list[float]:
    """Return when the GPU would be through with held[y:] and the shared experts alone, for every y."""
    loads, arrival_s, gpu_table = task.loads, task.arrival_s, task.cost.gpu_expert_s
    if not arrival_s:
        ends = list(accumulate([gpu_table[loads[e]] for e in reversed(held)], initial=task.shared_s))
        ends.reverse()
        return ends
    return [evaluate(task, (), gpu_order(task, held[y:]), ()).makespan_s for y in range(len(held) + 1)]


def _assignment(task: Task, held: list[int], missing: list[int], x: int, y: int, times: Sequence[float]) -> Assignment:
    arriving = missing[:x]
    return Assignment(missing[x:] + held[:y], gpu_order(task, held[y:]) + arriving, arriving, *times)
