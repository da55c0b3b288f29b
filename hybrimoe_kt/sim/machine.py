"""The simulated machine: clocks of CPU, GPUs and links that measure what a plan really costs.

The coordinator predicts with its own virtual clock; this one is independent of it. Each link serves transfers first
in, first out; a transfer also waits until the GPU has left the slot it overwrites; one that was given up before it
started is skipped; CPU work slows down while a link is busy. What is left out: the CPU's memory traffic does not slow
the link, and attention's quadratic part costs nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hybrimoe_kt.core.cost import CostModel
from hybrimoe_kt.core.timeline import Kind, Span, experts_label
from hybrimoe_kt.core.types import LayerSpec, Plan, Routing, Transfer


@dataclass
class Busy:
    """Seconds of work per kind of resource."""

    cpu: float = 0.0
    gpu: float = 0.0
    link: float = 0.0

    def add(self, kind: Kind, seconds: float) -> None:
        setattr(self, kind, getattr(self, kind) + seconds)


@dataclass
class Copy:
    """One transfer on a link: when it may start at the earliest, and when it does under all that is queued now."""

    transfer: Transfer
    plan: int
    ready_s: float
    seconds: float
    begin_s: float = 0.0
    end_s: float = 0.0


@dataclass
class Machine:
    """Clocks of one machine; `now_s` is when the layer at hand may begin."""

    specs: Mapping[int, LayerSpec]
    costs: Mapping[int, CostModel]
    noise: float = 0.0
    """Standard deviation of the logarithm of each CPU call's duration."""
    seed: int = 0
    on_span: Callable[[Span], None] | None = None
    """Receives every span as it is known, not in order of time."""
    now_s: float = 0.0
    busy: Busy = field(default_factory=Busy)
    num_plans: int = 0
    """Plans executed; the one at hand is the last of them."""

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._link_free_s = {spec.accelerator: 0.0 for spec in self.specs.values()}
        self._queue: dict[int, list[Copy]] = {spec.accelerator: [] for spec in self.specs.values()}
        self._recent: list[tuple[float, float]] = []
        self._arrival_s: dict[tuple[int, int], float] = {}
        self._slot_read_s: dict[tuple[int, int], float] = {}

    def run_layer(
        self, plan: Plan, prefetches: Sequence[Transfer], routing: Routing, aborted: Sequence[Transfer] = ()
    ) -> float:
        """Execute one plan with the prefetches decided beside it; return the seconds until its output is there.

        `aborted` are earlier prefetches that need not be made if the link has not started them.
        """
        start_s = self.now_s
        self.num_plans += 1
        self._settle(start_s)
        for transfer in aborted:
            self._abort(transfer)
        gpu_end_s = self._run_gpu(plan, routing, start_s)
        for transfer in prefetches:
            self._copy(transfer, start_s)
        self.now_s = max(gpu_end_s, self._run_cpu(plan, routing, start_s))
        return self.now_s - start_s

    def run_dense(self, seconds: float, label: str, lane: int = 0, *, layer: int = -1, has_gpu: bool = True) -> None:
        """Let everything between two MoE layers pass; the links go on meanwhile."""
        if seconds > 0:
            kind: Kind = "gpu" if has_gpu else "cpu"
            self._span(kind, lane, self.now_s, self.now_s + seconds, label, "head" if layer < 0 else "dense", layer)
            self.now_s += seconds

    def _run_gpu(self, plan: Plan, routing: Routing, start_s: float) -> float:
        cost, lane = self.costs[plan.layer], self.specs[plan.layer].accelerator
        shared_s = cost.shared_s[routing.num_tokens]
        end_s = start_s + shared_s
        if shared_s > 0:
            kind: Kind = "gpu" if cost.has_gpu else "cpu"
            self._span(kind, lane, start_s, end_s, f"L{plan.layer} shared", "shared", plan.layer)
        waiting = list(reversed(plan.transfers))
        arriving = {transfer.expert.index for transfer in waiting}
        for expert in plan.gpu:
            key = (plan.layer, expert)
            # Link order: everything queued before this expert's own copy starts first.
            while expert in arriving:
                transfer = waiting.pop()
                arriving.discard(transfer.expert.index)
                self._copy(transfer, start_s)
            begin_s = max(end_s, self._arrival_s.get(key, 0.0))
            end_s = begin_s + cost.gpu_s(routing.loads[expert])
            self._slot_read_s[plan.layer, plan.slots[expert]] = end_s
            label = experts_label(plan.layer, (expert,))
            self._span("gpu", lane, begin_s, end_s, label, "experts", plan.layer, (expert,), self._plan)
        for transfer in reversed(waiting):
            self._copy(transfer, start_s)
        return end_s

    def _copy(self, transfer: Transfer, start_s: float) -> None:
        layer = transfer.expert.layer
        lane = self.specs[layer].accelerator
        ready_s = max(start_s, self._slot_read_s.get((layer, transfer.slot), 0.0))
        copy = Copy(transfer, self.num_plans, ready_s, self.costs[layer].transfer_s(transfer.num_bytes))
        queue = self._queue[lane]
        self._place(copy, queue[-1].end_s if queue else self._link_free_s[lane])
        queue.append(copy)

    def _place(self, copy: Copy, free_s: float) -> None:
        copy.begin_s = max(free_s, copy.ready_s)
        copy.end_s = copy.begin_s + copy.seconds
        layer, expert = copy.transfer.expert
        self._arrival_s[layer, expert] = copy.end_s

    def _abort(self, transfer: Transfer) -> None:
        """Take a copy that has not begun out of its queue and move up those behind it."""
        lane = self.specs[transfer.expert.layer].accelerator
        queue = self._queue[lane]
        kept = [copy for copy in queue if copy.transfer != transfer or copy.begin_s <= self.now_s]
        if len(kept) == len(queue):
            return
        self._queue[lane] = kept
        free_s = self._link_free_s[lane]
        for copy in kept:
            if copy.begin_s > self.now_s:
                # The link became free when the abort was decided, not before.
                self._place(copy, max(free_s, self.now_s))
            free_s = copy.end_s

    def _settle(self, until_s: float) -> None:
        """Book the copies that have begun by `until_s`: nothing can move them any more."""
        for lane, queue in self._queue.items():
            begun = [copy for copy in queue if copy.begin_s <= until_s]
            for copy in begun:
                layer, expert = copy.transfer.expert
                self._link_free_s[lane] = copy.end_s
                self._recent.append((copy.begin_s, copy.end_s))
                kind, facts = copy.transfer.kind, {"plan": copy.plan, "slot": copy.transfer.slot}
                label = f"{experts_label(layer, (expert,))} {kind}"
                self._span("link", lane, copy.begin_s, copy.end_s, label, kind, layer, (expert,), facts)
            del queue[: len(begun)]
        self._recent = [span for span in self._recent if span[1] > until_s]

    def finish(self) -> None:
        """Book what the links still have to do; nothing is decided any more."""
        self._settle(float("inf"))

    def _run_cpu(self, plan: Plan, routing: Routing, start_s: float) -> float:
        if not plan.cpu:
            return start_s
        cost = self.costs[plan.layer]
        work_s = cost.cpu_s([routing.loads[expert] for expert in plan.cpu])
        if self.noise:
            work_s *= self._random.lognormvariate(0.0, self.noise)
        end_s = self._stretch(start_s, work_s, cost.cpu_slowdown)
        label = experts_label(plan.layer, plan.cpu)
        self._span("cpu", 0, start_s, end_s, label, "experts", plan.layer, plan.cpu, self._plan)
        return end_s

    def _stretch(self, start_s: float, work_s: float, slowdown: float) -> float:
        """Return when `work_s` seconds of idle-link work end, slower while a link is busy."""
        queued = [(copy.begin_s, copy.end_s) for queue in self._queue.values() for copy in queue]
        now_s = start_s
        for begin_s, end_s in sorted(self._recent + queued):
            idle_s = max(0.0, begin_s - now_s)
            if work_s <= idle_s:
                break
            work_s -= idle_s
            now_s = max(now_s, begin_s)
            done_s = max(0.0, end_s - now_s) / slowdown
            if work_s <= done_s:
                return now_s + work_s * slowdown
            work_s -= done_s
            now_s = max(now_s, end_s)
        return now_s + work_s

    @property
    def _plan(self) -> dict[str, Any]:
        return {"plan": self.num_plans}

    def _span(
        self,
        kind: Kind,
        lane: int,
        start_s: float,
        end_s: float,
        label: str,
        work: str,
        layer: int,
        experts: tuple[int, ...] = (),
        details: Mapping[str, Any] | None = None,
    ) -> None:
        self.busy.add(kind, end_s - start_s)
        if self.on_span is not None:
            number = lane if kind != "cpu" else 0
            self.on_span(Span(kind, number, start_s, end_s, label, work, layer, experts, details))
