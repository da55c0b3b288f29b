"""Conducts every layer step of a model: reads the routing, has it planned, hands the plan out, and joins the shares."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from hybrimoe_kt.backends.call_checks import check_finite
from hybrimoe_kt.core.coordinator import Coordinator
from hybrimoe_kt.core.timeline import Timeline
from hybrimoe_kt.core.types import LayerSpec, Phase, Plan, Routing
from hybrimoe_kt.device.accelerator import Accelerator, Event
from hybrimoe_kt.device.activity import ActivityLog
from hybrimoe_kt.device.backend import CpuBackend, GpuBackend, Routed
from hybrimoe_kt.device.busy import BusyMeter
from hybrimoe_kt.device.cores import dense_threads
from hybrimoe_kt.device.executor import DEVICE_ERRORS, AcceleratorFailed
from hybrimoe_kt.device.experts import LayerExperts
from hybrimoe_kt.device.lane import Lane
from hybrimoe_kt.device.readback import Predict, Step
from hybrimoe_kt.device.sent_routing import SentRouting
from hybrimoe_kt.device.step_graph import StepLost
from hybrimoe_kt.errors import ConfigError, first_line

from .assembly import Assembly, build
from .cpu_steps import CpuSteps
from .description import configuration, describe
from .device_planner import DevicePlanner
from .experts import ModelExperts
from .feedback import Feedback
from .health import Health
from .job import Job
from .look_ahead import LookAhead
from .planned_steps import PlannedStep
from .planner_refusal import refusal
from .recording import RoutingRecorder, halved, record
from .recovery import Recovery
from .routing import mean_probabilities, routing_of
from .seconds import Seconds

__all__ = ["Job", "Runtime", "assemble"]

logger = logging.getLogger(__name__)


class Runtime:
    """One a model, whole when it exists: `assemble` makes it. Not thread-safe, but for `statistics`.

    Per layer and step: `begin`, whatever the model computes meanwhile, `finish`; or `run` for both.
    """

    def __init__(
        self, experts: ModelExperts, assembly: Assembly, on_plan: Callable[[Plan, Routing], None] | None = None
    ) -> None:
        """`on_plan` is told of every plan as soon as it is made."""
        self.experts, self.options, self.store = experts, experts.options, experts.store
        self._assembly, self._on_plan = assembly, on_plan
        self.executor = assembly.executor
        self.coordinator: Coordinator = assembly.make_coordinator(self.options)
        self._reads_scores = self.coordinator.reads_scores
        self.seconds = Seconds()
        self.recorder: RoutingRecorder | None = None
        self._log: ActivityLog | None = None
        self._phase: Phase | None = None
        self._begun: Job | None = None
        """What has not been finished, and has no answer yet."""
        self._owed: Job | None = None
        """What has been finished, but for `settle`: its plan is open."""
        self._on_cpu = CpuSteps(self.coordinator, self.executor, self.seconds)
        self._recovery = Recovery(self.coordinator, self.executor)
        self._ahead = LookAhead(self.coordinator, self.executor, self._recovery, self.options.prefetch_size)
        is_timed = assembly.is_on_the_clock
        self._feedback = Feedback(self.options, self.coordinator, self.executor) if is_timed else None
        self._busy = BusyMeter(self.executor, list(self.store.layers))
        self._counting = threading.Lock()
        self._recovery.fill_slots()
        self._device_planner = self._make_device_planner()

    # What it is.

    def layer_specs(self) -> list[LayerSpec]:
        """What the coordinator knows of each MoE layer, in order."""
        return list(self._assembly.specs)

    def configuration(self) -> dict[str, Any]:
        """What decisions follow from, beside the routing, as plain data; layers in order."""
        planner = "host" if self.device_planner is None else "device"
        return configuration(self.options, self.store, self._assembly) | {"planner": planner}

    def new_coordinator(self) -> Coordinator:
        """Make a coordinator in its initial state for this model and these options."""
        return self._assembly.make_coordinator(self.options)

    def describe(self) -> str:
        """One line: what was decided."""
        said = describe(self.options, self.store, self._assembly)
        return said if self.device_planner is None else f"{said}; tokens planned on the device"

    @property
    def device_planner(self) -> DevicePlanner | None:
        """What plans single tokens on the device; None where the host does, or does again."""
        planner = self._device_planner
        if planner is None or planner.failure is not None:
            return None
        if not planner.is_open and planner.is_stale():  # the cache has shrunk
            planner.stop()
            self._device_planner = None  # where making another fails
            self._device_planner = planner = self._make_device_planner()
        return planner

    def _make_device_planner(self) -> DevicePlanner | None:
        if self.options.planner != "device":
            return None
        reason = refusal(self.experts, self.executor)
        if reason is not None:
            logger.warning("planner device is not used: %s; the host plans", reason)
            return None
        heard = self._feedback.share if self._feedback is not None else _unheard
        gates = self._ahead.gates
        return DevicePlanner(self.experts, self.coordinator, self.executor, gates, self._recovery, heard)

    def plan_on_host(self, reason: str) -> None:
        """Never have a device plan from now on, and say so, where that was asked for."""
        planner = self.device_planner
        if planner is not None:
            logger.warning("planner device is not used: %s; the host plans", reason)
            planner.give_back()
            planner.stop()
            self._device_planner = None

    def _host_plans(self) -> None:
        """Have slots and scores as a device has left them."""
        if self.device_planner is not None:
            self.device_planner.give_back()

    @property
    def lanes(self) -> tuple[Lane, ...]:
        """The accelerators at work; none on a CPU-only machine, and none once all have been given up."""
        return self.executor.lanes

    @property
    def accelerators(self) -> tuple[Accelerator, ...]:
        """Those that serve layers."""
        return tuple(lane.accelerator for lane in self.lanes)

    @property
    def num_slots(self) -> int:
        """Experts that can be resident at once, over all layers."""
        return self.executor.num_slots

    @property
    def num_dense_threads(self) -> int:
        """Threads that torch may compute with beside the experts': all cores, but for those that a backend keeps."""
        return dense_threads(self.executor.cpu.spinning_threads)

    @property
    def experts_read_in_place(self) -> list[LayerExperts]:
        """Those that the CPU backend reads where the host store has them, not from a copy of its own."""
        return [experts for layer, experts in self.store.layers.items() if not self.executor.cpu.copies(layer)]

    def device_of(self, layer: int) -> torch.device | None:
        """Where a layer's experts take their hidden states; None if they come from wherever the model is."""
        lane = self.executor.lane_of.get(layer)
        return None if lane is None else lane.accelerator.device

    @property
    def wants_scores(self) -> bool:
        """Whether anything uses the router's logits: without slots there is nothing to retain."""
        return self.recorder is not None or (self._reads_scores and self.executor.num_slots > 0)

    @property
    def is_listened_to(self) -> bool:
        """Whether every step is written down, so that none is passed over."""
        return self.recorder is not None or self._log is not None

    @property
    def wants_plans(self) -> bool:
        """Whether anybody is told of every plan."""
        return self.is_listened_to or self._on_plan is not None

    # How it fares.

    def health(self) -> Health:
        """What failed since the start, by accelerator, and what the fallback does."""
        return Health(self._recovery.health, self._feedback.fallback_state if self._feedback is not None else "off")

    def statistics(self) -> dict[str, float]:
        """Every counter since the start, by name. Waits for what was counted on a device; callable from any thread."""
        with self._counting:  # a server's metrics are read while it answers
            if self._device_planner is not None and self._device_planner.failure is None:
                self._device_planner.count()
            for lane in self.lanes:
                for layer, routed in lane.whole.routed().items():
                    self.coordinator.note_hits(layer, routed.counts, routed.last)
            return self.coordinator.stats.snapshot()

    def busy_shares(self) -> dict[str, float]:
        """Measured now and then: how much of the experts' steps CPU, GPU, link and host are busy, see `BusyMeter`."""
        return self._busy.shares()

    def record_timeline(self, timeline: Timeline) -> None:
        """Write down from now on what CPU, accelerators, links and scheduler do, until `finish_timeline`."""
        self._log = ActivityLog(timeline, min(self.store.layers))
        self.executor.log_to(self._log)

    def finish_timeline(self) -> Timeline | None:
        """Wait for what is under way and return the timeline; None if none was being recorded."""
        log, self._log = self._log, None
        return None if log is None else self.executor.finish_log(log)

    # What engines do with it.

    def look_ahead(self, layer: int, predict: Predict) -> None:
        """Register what predicts the routing of the layers after `layer`."""
        self._ahead.gates[layer] = predict

    def make_room(self, cause: Exception) -> bool:
        """Shrink the expert caches because the model's own work ran out of device memory; abandons a step under way.

        False if there was nothing left to shrink. Emulated accelerators share the host's memory, and shrink as well.
        """
        if self._begun is not None:
            self._abandon(self._begun)
        self._leave_owed()
        self._host_plans()
        shrunk = [self._recovery.make_room(lane, cause) for lane in self.lanes]
        return any(shrunk)

    @contextmanager
    def in_phase(self, phase: Phase) -> Iterator[None]:
        """Say what the steps within are part of, where what they route does not: one token of each of several texts."""
        self._phase = phase
        try:
            yield
        finally:
            self._phase = None

    def run(self, layer: int, routed: Routed) -> torch.Tensor:
        """Compute one layer's experts: `begin` and `finish`."""
        return self.finish(self.begin(layer, routed))

    def begin(self, layer: int, routed: Routed, sent: SentRouting | None = None) -> Job:
        """Start one layer's experts. What was begun before and never finished, after an error in between, is abandoned.

        Steps longer than `max_chunk_tokens` are computed in chunks, all but the last of them here. Reading the routing
        is the one synchronisation with the router's device. KernelError for hidden states that are not finite,
        ConfigError for a recorded step longer than a chunk, and for a layer that is not there. Where nothing is read,
        because every expert is resident, nothing is looked at either. `sent` is what a captured step has sent to the
        host of `routed`, which then stands where it is read.
        """
        if self._begun is not None:
            self._abandon(self._begun)
        if self._owed is not None:
            self._leave_owed()
        if layer not in self.store.layers:
            known = ", ".join(map(str, sorted(self.store.layers)))
            raise ConfigError(f"layer {layer} has no experts in this runtime, which has those of {known}")
        if layer == self._busy.first_layer:
            self._busy.begin()
        job, size = Job(layer, sent=sent), self.options.max_chunk_tokens
        lane = self.executor.lane_of.get(layer)
        if lane is not None and lane.accelerator.device != routed.hidden.device:
            job.home, routed = routed.hidden.device, routed.to(lane.accelerator.device)
        num_tokens = routed.hidden.shape[0]
        if num_tokens > size:
            if self.recorder is not None:
                raise ConfigError(
                    f"a recorded step has {num_tokens} tokens, one plan computes at most {size}; "
                    f"give max_chunk_tokens of at least that, or shorter steps"
                )
            *first, routed = routed.split(size)
            for chunk in first:
                part = Job(layer)
                self._begin(part, chunk)
                job.before.append(self.finish(part))
        self._begin(job, routed)
        return job

    def finish(self, job: Job, into: torch.Tensor | None = None) -> torch.Tensor:
        """Wait for what `begin` started; returns `[num_tokens, hidden]` in the hidden states' dtype and place.

        Waits for the CPU's share, and feeds the links meanwhile; what is on the device is only enqueued. The answer
        is in memory of its own, or `into` where that is given: on an accelerator's stream, see `Lane.finish`.
        """
        began, plan, step, answer = time.perf_counter(), job.plan, job.step, job.answer
        if answer is None and job is not self._begun:
            raise ConfigError("this step is over: it was finished before, or another one began, which abandoned it")
        self.seconds.steps += 1
        if job.on_cpu is not None:
            self._begun = None
            answer = self._on_cpu.finish(job.on_cpu, job.predicted_s)
        elif plan is not None and step is not None and job.routing is not None:
            if answer is None:
                answer = self._join(job, plan, step, into)
            if self.recorder is not None:
                guesses = self._ahead.guesses(job.layer, step)
                record(self.recorder, job.routing, step.host.ids, step.host.weights, job.logits, guesses)
            ended = time.perf_counter()
            self.seconds.wait += ended - began
            if self._log is not None:
                self._log.finished(ended)
        assert answer is not None, "a step without a plan has an answer"
        if job.layer == self._busy.last_layer:
            self._busy.end()
        if job.before:
            answer = torch.cat([*job.before, answer])
        if into is not None:
            return answer if answer is into else into.copy_(answer)
        return answer if job.home is None else answer.to(job.home)

    def _join(self, job: Job, plan: Plan, step: Step, into: torch.Tensor | None) -> torch.Tensor:
        """Join the shares of a plan and close it."""
        try:
            answer = self.executor.join(plan, step, into if job.home is None else None)
        except AcceleratorFailed as failure:
            return self._recover(failure, plan, step)
        except BaseException:
            self._abandon(job)
            raise
        if self._feedback is not None and job.routing is not None:
            self._feedback.step(plan, job.read_s, learns=job.routing.is_decode and self.recorder is None)
        self._begun = None
        if job.can_wait:
            self._owed = job
        else:
            self._close(plan)
        return answer

    def settle(self) -> None:
        """Learn from what was finished last and choose prefetches, where that could wait; StepLost where it fails.

        So it can in a captured step of which the CPU has no share: the device is given its next piece before. Else it
        has been done beside the CPU's share. What `begin` finds not to be settled is not looked ahead from.
        """
        job, self._owed = self._owed, None
        if job is None or job.plan is None or job.step is None or job.routing is None:
            return
        began, plan = time.perf_counter(), job.plan
        try:
            self._ahead.prefetch(plan, job.step, job.routing.phase, self._log, is_recorded=False)
        except AcceleratorFailed as failure:
            self._close(plan)
            self._recovery.recover_lost(failure)
            raise StepLost(f"{failure.lane.accelerator.name} failed: {first_line(failure.cause)}") from failure
        except BaseException:
            self._abandon(job)
            raise
        self._close(plan)
        self.seconds.prefetch += time.perf_counter() - began

    def feed_links(self) -> None:
        """Send prefetches that wait, as far as there is room: for when no step is joined soon, as joining does it."""
        try:
            self.executor.feed_links()
        except AcceleratorFailed as failure:
            self._recovery.recover(failure)

    def _leave_owed(self) -> None:
        """After an error in between, or where nobody settles."""
        job, self._owed = self._owed, None
        if job is not None and job.plan is not None:
            self._close(job.plan)

    def _begin(self, job: Job, routed: Routed) -> None:
        """Read one chunk, plan it and start it; leaves its answer in `job` where nothing is left to wait for."""
        if not self.executor.lanes and self._nobody_listens:
            self._on_cpu.begin(job, routed if self._phase is None else routed._replace(phase=self._phase))
            self._begun = job if job.answer is None else None
            return
        layer, seconds, now = job.layer, self.seconds, time.perf_counter
        began = now()
        if routed.ids.dtype is torch.int32:
            routed = routed.with_long_ids()
        if self._phase is not None and routed.phase is None:
            routed = routed._replace(phase=self._phase)
        lane = self.executor.lane_of.get(layer)
        num_tokens = routed.hidden.shape[0]
        if (
            lane is not None
            and self.coordinator.decides_nothing(layer, num_tokens)
            and self.is_whole(layer, num_tokens)
        ):
            self._run_whole(job, lane, routed)
            seconds.submit_and_gpu += now() - began
            return
        if self._device_planner is not None:
            self._host_plans()
        step = self._read(lane, layer, routed, job.sent)
        job.step, job.logits, job.read_s = step, routed.logits, now()
        job.routing = routing = routing_of(layer, step, routed.phase)
        if not routing.loads:  # all of it is other ranks'
            job.answer = torch.zeros_like(routed.hidden)
            return
        job.plan = plan = self.coordinator.plan(routing)
        self._begun = job
        planned = now()
        if self._on_plan is not None:
            self._on_plan(plan, routing)
        if self._log is not None:
            self._log.waited(layer, began, job.read_s)
            self._log.planned(plan, routing, job.read_s, planned)
        try:
            if plan.dropped or plan.closed:
                self.executor.heed(plan.dropped, plan.closed)
            self.executor.start(plan, step)
            started = now()
            job.can_wait = job.sent is not None and not plan.cpu and self.recorder is None
            if not job.can_wait:
                self._ahead.prefetch(plan, step, routed.phase, self._log, is_recorded=self.recorder is not None)
        except AcceleratorFailed as failure:
            job.answer = self._recover(failure, plan, step)
            started = now()
        except BaseException:
            self._abandon(job)
            raise
        seconds.read += job.read_s - began
        seconds.plan += planned - job.read_s
        seconds.submit_and_gpu += started - planned
        seconds.prefetch += now() - started

    def _read(self, lane: Lane | None, layer: int, routed: Routed, sent: SentRouting | None) -> Step:
        is_wanted = sent is None and (self._reads_scores or self.recorder is not None)
        scores = self.scores(routed) if is_wanted else None
        step: Step | None = None
        if lane is not None:
            try:
                step = lane.read(routed, scores) if sent is None else lane.readback.take(sent)
            except DEVICE_ERRORS as error:
                if sent is not None:
                    self._recovery.recover_lost(AcceleratorFailed(lane, error))
                    raise StepLost(f"{lane.accelerator.name} failed: {first_line(error)}") from error
                self._recovery.recover(AcceleratorFailed(lane, error))
        if step is None:
            step = Step.on_host(routed, scores)
        check_finite(layer, step.host.hidden)
        return step

    def end_replay(self, accelerator: Accelerator, done: Event) -> None:
        """Wait for what captured steps have enqueued before `done`; StepLost where that has failed."""
        try:
            self.executor.wait(done, f"a captured step on {accelerator.name}")
        except DEVICE_ERRORS as error:
            for lane in self.lanes:
                if lane.accelerator is accelerator:
                    self._recovery.recover_lost(AcceleratorFailed(lane, error))
            raise StepLost(f"{accelerator.name} failed: {first_line(error)}") from error

    def note_planned(self, steps: Sequence[PlannedStep], began_s: float) -> None:
        """A token has ended that a device has planned; the host has waited for it since `began_s`."""
        ended_s = time.perf_counter()
        for step in steps:
            plan, routing = step.plan, step.routing
            if self._on_plan is not None:
                self._on_plan(plan, routing)
            if self._log is not None:
                self._log.planned(plan, routing, began_s, began_s)
                self._log.chose(plan.layer, step.ahead, began_s, began_s)
                if step.share_s is not None:
                    self._log.computed(plan.layer, plan.cpu, *step.share_s)
                self._log.finished(ended_s)
            if self.recorder is not None:
                ids = torch.tensor([list(routing.loads)])
                record(self.recorder, routing, ids, step.weights, step.logits, step.guesses)

    def note_replay(self, layer: int, began_s: float) -> None:
        """A captured piece has been enqueued since `began_s`, in front of the experts of `layer`; -1: behind all."""
        ended_s = time.perf_counter()
        self.seconds.replay += ended_s - began_s
        if self._log is not None:
            self._log.replayed(layer, began_s, ended_s)

    def scores(self, routed: Routed) -> torch.Tensor | None:
        """What is read of the router's logits, float32 `[num_experts]`; None where nobody uses them."""
        wanted = self.recorder is not None or (self._reads_scores and self.executor.num_slots)
        if routed.logits is None or not wanted:
            return None
        scores = mean_probabilities(routed.logits, routed.probabilities)
        return scores if self.recorder is None else halved(scores)

    @property
    def _nobody_listens(self) -> bool:
        """Whether no one asks how steps are planned."""
        return self._on_plan is None and self.recorder is None and self._log is None and self._feedback is None

    def is_whole(self, layer: int, num_tokens: int) -> bool:
        """Whether a step of `layer` is its accelerator's whatever is routed, and nobody wants to know what is."""
        lane = self.executor.lane_of.get(layer)
        if self.experts.is_share:  # counts on the device know no pairs of other ranks
            return False
        if lane is None or not lane.gpu.finds_routed or not self.coordinator.decides_nothing(layer, num_tokens):
            return False
        return not self.is_listened_to and self._ahead.needs_nothing(layer, num_tokens)

    def _run_whole(self, job: Job, lane: Lane, routed: Routed) -> None:
        """Enqueue a step of which nothing is read."""
        slot_of = self.coordinator.pass_over(job.layer, routed.hidden.shape[0])
        try:
            job.answer = lane.run_whole(job.layer, slot_of, routed)
        except DEVICE_ERRORS as error:
            self._recovery.recover(AcceleratorFailed(lane, error))
            job.answer = self.executor.compute_on_cpu(job.layer, Step.on_host(routed))

    def _recover(self, failure: AcceleratorFailed, plan: Plan, step: Step) -> torch.Tensor:
        """Compute the step on the CPU, and leave slots and cache as if the accelerator had not been asked."""
        self._close(plan)
        self._recovery.recover(failure, plan)
        return self.executor.compute_on_cpu(plan.layer, step)

    def _abandon(self, job: Job) -> None:
        """Leave nothing half done after an error that the step cannot survive."""
        self._begun = None
        if job.plan is not None:
            self._close(job.plan)
        self._recovery.abandon(job.plan)

    def _close(self, plan: Plan) -> None:
        self._begun = None
        orders = self.coordinator.finish(plan)
        if orders.closed:
            self.executor.heed(orders.dropped, orders.closed)


def _unheard(layer: int, num_experts: int, seconds: float) -> None:
    """Where no measured second means anything."""


def assemble(
    experts: ModelExperts,
    *,
    cpu: CpuBackend | None = None,
    accelerators: Mapping[str, Accelerator] | None = None,
    gpus: Mapping[str, GpuBackend] | None = None,
    on_plan: Callable[[Plan, Routing], None] | None = None,
) -> Runtime:
    """Make slots, backends and coordinator for these experts, and fill the slots. May take seconds.

    What is handed in is taken instead of what the options name: the CPU's backend, accelerators and their backends by
    the name that layers call them. ConfigError, CapacityError or ModelError for what cannot be.
    """
    runtime = Runtime(experts, build(experts, cpu, accelerators or {}, gpus or {}), on_plan)
    logger.info("%s", runtime.describe())
    return runtime
