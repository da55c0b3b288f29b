"""What a scheduler is given, what it answers, and the one definition of makespan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from hybrimoe_kt.core.cost import CostModel


@dataclass(slots=True)
class Task:
    """One layer step to schedule.

    `held` are the routed experts in a slot (resident or pending), `missing` the others; `arrival_s` maps the
    pending ones -> seconds until they land. `num_free` slots can take a transfer at once without disturbing
    the plan; beyond that a transfer waits for an expert of this plan to leave the GPU. Times count from now.
    """

    cost: CostModel
    loads: Mapping[int, int]
    held: list[int]
    missing: list[int]
    layer: int = 0
    arrival_s: Mapping[int, float] = field(default_factory=dict)
    link_busy_s: float = 0.0
    shared_s: float = 0.0
    num_free: int = 1 << 30
    load: int = 0
    """Of every expert, where all have the same; 0: they differ, or nobody has looked."""


@dataclass(slots=True)
class Assignment:
    """A scheduler's answer: `cpu` and `gpu` partition the routed experts, `transfers` is a sub-sequence of `gpu`.

    `gpu` is in launch order, `transfers` in link order. `cpu_s`, `gpu_s` and `link_s` are the predicted busy
    seconds of this step's own work, `makespan_s` its predicted end.
    """

    cpu: Sequence[int]
    gpu: Sequence[int]
    transfers: Sequence[int]
    makespan_s: float
    cpu_s: float
    gpu_s: float
    link_s: float


def equal_load(task: Task) -> int:
    """Return the load that all experts have, 0 if they differ."""
    if task.load:
        return task.load
    found = set(task.loads.values())
    return found.pop() if len(found) == 1 else 0


def by_load(task: Task, experts: Sequence[int]) -> list[int]:
    """Return `experts`, the highest load first, ties in the order given."""
    loads = task.loads
    return sorted(experts, key=loads.__getitem__, reverse=True)


def gpu_order(task: Task, held: Sequence[int]) -> list[int]:
    """Return `held` in launch order: the resident by falling load, then the pending as they land."""
    arrival_s = task.arrival_s
    if not arrival_s:
        return by_load(task, held)
    ready = by_load(task, [e for e in held if e not in arrival_s])
    return ready + sorted((e for e in held if e in arrival_s), key=lambda e: (arrival_s[e], e))


def cpu_task(cost: CostModel, loads: Mapping[int, int]) -> Task:
    """Describe a step of a layer that has no slots."""
    return Task(cost, loads, [], list(loads), num_free=0)


def all_on_cpu(task: Task) -> Assignment:
    """Return the assignment that leaves GPU and link alone."""
    cpu, loads = [*task.missing, *task.held], task.loads
    return _on_cpu(task.cost, cpu, [loads[e] for e in cpu], task.link_busy_s, task.shared_s)


def without_slots(cost: CostModel, loads: Mapping[int, int]) -> Assignment:
    """The same for a step of a layer that has none: `all_on_cpu(cpu_task(cost, loads))`, sooner."""
    return _on_cpu(cost, list(loads), loads.values(), 0.0, 0.0)


def _on_cpu(
    cost: CostModel, cpu: Sequence[int], loads: Iterable[int], link_busy_s: float, shared_s: float
) -> Assignment:
    cpu_s = cost.cpu_end_s(cost.cpu_s(loads), link_busy_s)
    return Assignment(cpu, (), (), max(cpu_s, shared_s), cpu_s, 0.0, 0.0)


def evaluate(task: Task, cpu: Sequence[int], gpu: Sequence[int], transfers: Sequence[int]) -> Assignment:
    """Return the assignment with its predicted times: the one definition of makespan all schedulers share.

    The link is first in, first out, behind what it has started; the k-th transfer beyond the free slots also
    waits until the k-th expert of `gpu` has left the GPU. The GPU runs `gpu` in order, after the shared
    experts, each expert once its weights are there.
    """
    cost, loads = task.cost, task.loads
    gpu_table, transfer_s = cost.gpu_expert_s, cost.expert_transfer_s
    arrival_s: dict[int, float] = dict(task.arrival_s)
    gpu_end_s, gpu_busy_s, link_end_s = task.shared_s, task.shared_s, task.link_busy_s
    ends_s: list[float] = []
    num_waiting = -num_open_slots(task, cpu)
    arriving = set(transfers)
    for expert in gpu:
        if expert in arriving:
            if num_waiting >= 0 and ends_s[num_waiting] > link_end_s:
                link_end_s = ends_s[num_waiting]
            link_end_s += transfer_s
            arrival_s[expert] = link_end_s
            num_waiting += 1
        expert_s = gpu_table[loads[expert]]
        gpu_busy_s += expert_s
        gpu_end_s = max(gpu_end_s, arrival_s.get(expert, 0.0)) + expert_s
        ends_s.append(gpu_end_s)
    cpu_s = cost.cpu_end_s(cost.cpu_s([loads[e] for e in cpu]), link_end_s)
    return Assignment(cpu, gpu, transfers, max(cpu_s, gpu_end_s), cpu_s, gpu_busy_s, transfer_s * len(transfers))


def num_open_slots(task: Task, cpu: Sequence[int]) -> int:
    """Return how many transfers need not wait for a slot: the free ones and those of residents left to the CPU."""
    if not task.held or not cpu:
        return task.num_free
    held = set(task.held)
    return task.num_free + sum(e in held and e not in task.arrival_s for e in cpu)
