"""Replay: a trace drives a coordinator exactly as a host does, and a simulated machine measures its plans."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from hybrimoe_kt.core.coordinator import Coordinator
from hybrimoe_kt.core.cost import CostModel
from hybrimoe_kt.core.device_coordinator import DeviceCoordinator
from hybrimoe_kt.core.timeline import Span, plan_details
from hybrimoe_kt.core.types import LayerSpec, Plan, Routing, Transfer

from .machine import Busy, Machine
from .trace import Phase, Step, Trace

LookAhead = Callable[[Trace, Step, int, int], Sequence[Routing]]
"""(trace, step, position, depth) -> what the host would predict for the layers after `position`."""
Decides = Coordinator | DeviceCoordinator


class Decision(NamedTuple):
    """Everything decided for one layer of one step."""

    step: Step
    position: int
    routing: Routing
    plan: Plan
    prefetches: tuple[Transfer, ...]
    aborted: tuple[Transfer, ...] = ()
    """Earlier prefetches given up here."""


def no_look_ahead(trace: Trace, step: Step, position: int, depth: int) -> Sequence[Routing]:
    """A host that sees no gate but the current one."""
    return ()


def recorded_look_ahead(trace: Trace, step: Step, position: int, depth: int) -> Sequence[Routing]:
    """The next gates' predictions that came with the trace."""
    return trace.predictions(step, position, depth)


def perfect_look_ahead(trace: Trace, step: Step, position: int, depth: int) -> Sequence[Routing]:
    """What the next layers will be asked, past the end of the step where another follows: a bound, not a predictor."""
    result = []
    for ahead in range(1, depth + 1):
        steps, place = divmod(position + ahead, len(trace.layers))
        if step.index + steps >= len(trace.steps):
            break
        result.append(trace.routing(trace.steps[step.index + steps], place))
    return result


def drive(trace: Trace, coordinator: Decides, look_ahead: LookAhead = recorded_look_ahead) -> Iterator[Decision]:
    """Yield each decision while its plan is open; the plan is finished when the next one is asked for."""
    strategy = coordinator.strategy
    depth = strategy.prefetch_depth if strategy.prefetch_size > 0 else 0
    late: tuple[Transfer, ...] = ()  # given up at the end of the layer before
    for step in trace.steps:
        for position in range(len(trace.layers)):
            routing = trace.routing(step, position)
            plan = coordinator.plan(routing)
            guesses = look_ahead(trace, step, position, depth) if depth else ()
            ahead = coordinator.prefetch(plan, guesses)
            yield Decision(step, position, routing, plan, ahead.transfers, (*late, *plan.dropped, *ahead.dropped))
            late = coordinator.finish(plan).dropped


def decisions(trace: Trace, coordinator: Decides, look_ahead: LookAhead = recorded_look_ahead) -> list[Plan]:
    """Return every plan of a replay, for comparison with those a runtime made of the same routing."""
    return [decision.plan for decision in drive(trace, coordinator, look_ahead)]


class Digest:
    """SHA-256 over decisions: expert ids, slots and their order, no floating-point numbers."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, decision: Decision) -> None:
        plan = decision.plan
        slots = sorted(plan.slots.items())
        copies = [_copy_key(transfer) for transfer in (*plan.transfers, *decision.prefetches, *decision.aborted)]
        text = f"{plan.layer}|{list(plan.cpu)}|{list(plan.gpu)}|{slots}|{copies}|{plan.num_hits};"
        self._hash.update(text.encode())

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def _copy_key(transfer: Transfer) -> tuple[object, ...]:
    evicted = None if transfer.evicted is None else tuple(transfer.evicted)
    return (*transfer.expert, transfer.slot, transfer.kind, evicted)


@dataclass
class PhaseResult:
    """Sums over the measured steps of one phase."""

    seconds: list[float] = field(default_factory=list)
    """Duration of each step."""
    busy: Busy = field(default_factory=Busy)
    hits: int = 0
    routed: int = 0
    experts_on_cpu: int = 0
    num_transfers: int = 0
    num_prefetches: int = 0
    moved_bytes: int = 0

    @property
    def total_s(self) -> float:
        return sum(self.seconds)

    @property
    def mean_s(self) -> float:
        return self.total_s / len(self.seconds) if self.seconds else float("nan")

    @property
    def hit_rate(self) -> float:
        return self.hits / self.routed if self.routed else float("nan")

    def share(self, kind: str) -> float:
        """Return the busy share of a resource; its work may outlast the phase, so the share is capped at 1."""
        return min(1.0, float(getattr(self.busy, kind)) / self.total_s) if self.seconds else float("nan")


@dataclass
class Replay:
    """What one replay measured."""

    phases: dict[Phase, PhaseResult]
    digest: str
    stats: Mapping[str, float]
    """The coordinator's own counters at the end, warm-up included."""

    @property
    def ttft_s(self) -> float:
        """Mean seconds of a prefill step."""
        return self.phases["prefill"].mean_s

    @property
    def token_s(self) -> float:
        """Mean seconds of a decode step."""
        return self.phases["decode"].mean_s


@dataclass(frozen=True)
class Outside:
    """Seconds of a step outside the MoE layers: dense layers and the output head."""

    step_s: float = 0.0
    token_s: float = 0.0
    head_s: float = 0.0

    def seconds(self, num_tokens: int) -> float:
        return max(self.step_s, self.token_s * num_tokens) + self.head_s


def replay(
    trace: Trace,
    coordinator: Decides,
    specs: Sequence[LayerSpec],
    costs: Mapping[int, CostModel],
    *,
    look_ahead: LookAhead = recorded_look_ahead,
    outside: Outside | None = None,
    warmup: int = 0,
    noise: float = 0.0,
    seed: int = 0,
    on_span: Callable[[Span], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Replay:
    """Run `trace` through `coordinator` (changing it) and measure every step after the first `warmup` ones.

    `noise` perturbs CPU durations on the machine only: the coordinator does not know of it.
    """
    machine = Machine({spec.layer: spec for spec in specs}, costs, noise=noise, seed=seed, on_span=on_span)
    meter = _Meter(machine, outside or Outside(), len(trace.layers), warmup, progress)
    digest = Digest()
    for decision in drive(trace, coordinator, look_ahead):
        digest.add(decision)
        meter.measure(decision)
    machine.finish()
    return Replay(meter.phases, digest.hexdigest(), coordinator.stats.snapshot())


@dataclass
class _Meter:
    """Moves the machine through decisions and books the time of whole steps."""

    machine: Machine
    outside: Outside
    num_layers: int
    warmup: int
    progress: Callable[[int], None] | None

    def __post_init__(self) -> None:
        self.phases: dict[Phase, PhaseResult] = {"prefill": PhaseResult(), "decode": PhaseResult()}
        self._begin_s = 0.0

    def measure(self, decision: Decision) -> None:
        step, machine = decision.step, self.machine
        layer = decision.plan.layer
        cost, lane = machine.costs[layer], machine.specs[layer].accelerator
        result = self.phases[step.phase] if step.index >= self.warmup else PhaseResult()
        machine.busy = result.busy
        if decision.position == 0:
            self._begin_s = machine.now_s
        # A layer's attention runs before its experts.
        seconds = cost.between_layers_s[step.num_tokens]
        machine.run_dense(seconds, f"L{layer} dense", lane, layer=layer, has_gpu=cost.has_gpu)
        begin_s = machine.now_s
        machine.run_layer(decision.plan, decision.prefetches, decision.routing, decision.aborted)
        if machine.on_span is not None:
            details = plan_details(machine.num_plans, decision.plan, decision.prefetches)
            # Deciding takes no time here.
            machine.on_span(Span("scheduler", 0, begin_s, begin_s, f"L{layer} plan", "plan", layer, (), details))
        _count(result, decision)
        if decision.position == self.num_layers - 1:
            machine.run_dense(self.outside.seconds(step.num_tokens), "head", lane, has_gpu=cost.has_gpu)
            result.seconds.append(machine.now_s - self._begin_s)
            if machine.on_span is not None:
                facts = {"step": step.index, "tokens": step.num_tokens}
                label = f"{step.phase} {step.num_tokens}"
                machine.on_span(Span("step", 0, self._begin_s, machine.now_s, label, step.phase, details=facts))
            if self.progress is not None:
                self.progress(1)


def _count(result: PhaseResult, decision: Decision) -> None:
    plan = decision.plan
    result.hits += plan.num_hits
    result.routed += len(decision.routing.loads)
    result.experts_on_cpu += len(plan.cpu)
    result.num_transfers += len(plan.transfers)
    result.num_prefetches += len(decision.prefetches)
    result.moved_bytes += sum(transfer.num_bytes for transfer in (*plan.transfers, *decision.prefetches))
