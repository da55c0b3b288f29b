"""The schedules others use: one device alone, a static split, whole layers, each expert by itself."""

from __future__ import annotations

from typing import Any

from hybrimoe_kt.core.policies.base import check_range

from .base import Assignment, Task, all_on_cpu, by_load, evaluate, gpu_order
from .scheduler import Scheduler


class CpuOnlyScheduler(Scheduler):
    """Everything on the CPU, whatever is resident."""

    name = "cpu_only"

    def assign(self, task: Task) -> Assignment:
        """Return the one assignment there is."""
        return all_on_cpu(task)


class StaticScheduler(Scheduler):
    """kTransformers: resident experts on the GPU, the others on the CPU, no transfer ever."""

    name = "static"

    def assign(self, task: Task) -> Assignment:
        """Return resident -> GPU, missing -> CPU."""
        return evaluate(task, task.missing, gpu_order(task, task.held), ())


class LayerSplitScheduler(Scheduler):
    """llama.cpp: a layer runs on the GPU when all its routed experts stand there, otherwise on the CPU whole."""

    name = "layer_split"

    def assign(self, task: Task) -> Assignment:
        """Return all on the GPU or all on the CPU."""
        if task.missing:
            return all_on_cpu(task)
        return evaluate(task, (), gpu_order(task, task.held), ())


class GpuOnlyScheduler(Scheduler):
    """On-demand loading (Mixtral-offloading, AdapMoE): every missing expert is transferred, nothing runs on the CPU."""

    name = "gpu_only"

    def assign(self, task: Task) -> Assignment:
        """Return every expert on the GPU; the CPU steps in only where the layer has no slot to stream through."""
        if task.missing and task.num_free + len(task.held) == 0:
            return all_on_cpu(task)
        arriving = by_load(task, task.missing)
        return evaluate(task, (), gpu_order(task, task.held) + arriving, arriving)


class FiddlerScheduler(Scheduler):
    """Fiddler: each missing expert goes where it alone is faster, CPU time against transfer plus GPU time."""

    name = "fiddler"

    def assign(self, task: Task) -> Assignment:
        """Return the independent choice of every missing expert; resident ones stay on the GPU."""
        cost, loads = task.cost, task.loads
        transfer_s = cost.expert_transfer_s
        arriving, cpu = [], []
        may_stream = task.num_free + len(task.held) > 0
        for expert in by_load(task, task.missing):
            load = loads[expert]
            if may_stream and transfer_s + cost.gpu_expert_s[load] < cost.cpu_s((load,)):
                arriving.append(expert)
            else:
                cpu.append(expert)
        return evaluate(task, cpu, gpu_order(task, task.held) + arriving, arriving)


class OneRatioScheduler(Scheduler):
    """FreeToken: residents on the GPU, the missing divided between link and CPU by one ratio, whatever else is to do.

    `share` of them is brought, rounded to whichever whole number lets both end sooner; 0 takes the share at which
    both take equally long.
    """

    name = "one_ratio"
    options = {"share": 0.0}  # noqa: RUF012

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        check_range("scheduler one_ratio", "share", self.option["share"], 0.0, 1.0)

    def assign(self, task: Task) -> Assignment:
        """Return the one division there is."""
        cost, missing = task.cost, by_load(task, task.missing)
        cpu_s = cost.cpu_expert_s[1]
        share = self.option["share"] or cpu_s / (cpu_s + cost.expert_transfer_s)
        low = int(share * len(missing))
        most = len(missing) if task.num_free + len(task.held) else 0
        counts = [count for count in (low, low + 1) if count <= most] or [most]
        best = min(counts, key=lambda count: max(count * cost.expert_transfer_s, (len(missing) - count) * cpu_s))
        arriving = missing[:best]
        return evaluate(task, missing[best:], gpu_order(task, task.held) + arriving, arriving)
