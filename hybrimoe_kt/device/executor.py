"""Runs one frozen plan: the CPU share submitted first, the accelerator's enqueued beside it, then the join.

The executor owns the order of things within a layer and knows nothing of why the plan is as it is. While it waits
for the CPU it feeds the link. What an accelerator fails at comes out as `AcceleratorFailed`; the step can then be
computed on the CPU alone, from what was read.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence

import torch

from hybrimoe_kt.core.timeline import Timeline
from hybrimoe_kt.core.types import Plan, Transfer
from hybrimoe_kt.errors import CapacityError, DeadlineError, KernelError

from .accelerator import Event
from .activity import ActivityLog, Watcher
from .backend import CpuBackend, Routed
from .lane import Lane
from .readback import Step
from .waiting import SHARE_SLEPT, Deadline

__all__ = ["DEVICE_ERRORS", "AcceleratorFailed", "Executor"]


DEVICE_ERRORS = (KernelError, CapacityError, RuntimeError)
"""What devices and drivers raise, the last by way of torch; mistakes of ours stay what they are."""


class AcceleratorFailed(Exception):
    """An accelerator could not do its share; `lane` is which, `cause` why. Never leaves the runtime."""

    def __init__(self, lane: Lane, cause: Exception) -> None:
        super().__init__(f"{lane.accelerator.name}: {cause}")
        self.lane, self.cause = lane, cause


class Executor:
    """One CPU backend and any number of accelerators, each serving its own layers."""

    def __init__(self, cpu: CpuBackend, lanes: Sequence[Lane], deadline: Deadline) -> None:
        self.cpu, self.lanes, self._deadline = cpu, tuple(lanes), deadline
        self.lane_of: dict[int, Lane] = {layer: lane for lane in lanes for layer in lane.layers}
        """Layer -> the accelerator that serves it; layers that none serves are not there."""
        self.num_slots = 0
        """Experts that can be resident at once, over all layers."""
        self.count_slots()
        self._kept: list[Lane] = []
        self._cpu_busy = self._cpu_is_dead = False
        self._answered: torch.Tensor | None = None
        """What the CPU has computed in this thread already, of the step under way."""
        self._cpu_pace = 0.0
        """Seconds waited for the CPU per second predicted, a moving average: how long to sleep before polling."""
        self._cpu_began_s = 0.0
        self.cpu_share_s = 0.0
        """From submitting the last CPU share to seeing it done, seconds; `cpu_was_waited_for` if not done at once."""
        self.cpu_was_waited_for = False
        self._mine = torch.empty(1, 0, dtype=torch.int64)
        self.log: Watcher | None = None
        self._submitted: tuple[int, tuple[int, ...], float] = 0, (), 0.0
        """Layer and experts of the CPU share under way, and when it was submitted; kept for the log only."""
        self._cpu_name = f"the CPU experts' worker ({cpu.name})"

    def log_to(self, log: Watcher | None) -> None:
        """Write down from now on what is done; None: stop."""
        self.log = log
        for number, lane in enumerate(self.lanes):
            lane.log_to(log, number)

    def finish_log(self, log: ActivityLog) -> Timeline:
        """Stop writing down, wait for what is under way, and return the timeline."""
        for number, lane in enumerate(self.lanes):
            name = f"GPU {number}, link {number} ({lane.accelerator.name})"
            log.timeline.info[name] = lane.accelerator.stamps_are  # known for certain after the first stamp only
        self.log_to(None)
        for lane in self.lanes:
            with contextlib.suppress(DeadlineError):
                lane.drain()
        return log.close()

    def remove(self, lane: Lane, *, keep: bool) -> None:
        """Never ask an accelerator again; its layers are computed on the CPU.

        `keep` its memory where something may still write to it.
        """
        if keep:
            self._kept.append(lane)
        self.lanes = tuple(other for other in self.lanes if other is not lane)
        self.lane_of = {layer: other for layer, other in self.lane_of.items() if other is not lane}
        self.count_slots()

    def count_slots(self) -> None:
        """Take note that a lane's number of slots has changed."""
        self.num_slots = sum([lane.pool.num_slots for lane in self.lanes])

    def start(self, plan: Plan, step: Step) -> None:
        """Submit the CPU share, enqueue the accelerator's."""
        if plan.cpu:
            self.start_on_cpu(plan.layer, self._only(step.host, plan.cpu) if plan.gpu else step.host, plan.cpu)
        if plan.gpu:
            lane = self.lane_of[plan.layer]
            try:
                lane.run(plan, step)
            except DEVICE_ERRORS as error:
                raise AcceleratorFailed(lane, error) from error

    def start_on_cpu(self, layer: int, host: Routed, experts: tuple[int, ...] = ()) -> None:
        """Submit what the CPU is to compute of a step, `experts` for the log; with nothing beside it, compute it."""
        if self._cpu_is_dead:
            raise self._dead()
        began = time.perf_counter()
        if self.log is not None:
            self._submitted = layer, experts, began
        self._answered = None if self.lanes else self.cpu.compute(layer, host)
        if self._answered is None:
            self.cpu.submit(layer, host)
            began = time.perf_counter()
        self._cpu_busy, self._cpu_began_s = True, began

    def finish_on_cpu(self, routed: Routed, predicted_s: float) -> torch.Tensor:
        """Wait for a step of which the CPU was given everything; `[num_tokens, hidden]` as `routed` has it."""
        is_own = self._answered is not None
        return _to_model(self._wait_cpu(None, predicted_s), routed.hidden, is_own=is_own)

    def fill(self, transfer: Transfer) -> None:
        """Bring one expert into its slot at once; no effect where its accelerator has been removed."""
        lane = self.lane_of.get(transfer.expert.layer)
        if lane is not None:
            try:
                lane.queue.start(transfer)
            except DEVICE_ERRORS as error:
                raise AcceleratorFailed(lane, error) from error

    def prefetch(self, transfers: Sequence[Transfer]) -> None:
        """Bring experts into their slots as the links have room."""
        for transfer in transfers:
            lane = self.lane_of[transfer.expert.layer]
            try:
                lane.queue.enqueue(transfer)
            except DEVICE_ERRORS as error:
                raise AcceleratorFailed(lane, error) from error

    def heed(self, dropped: Sequence[Transfer], closed: Sequence[int]) -> None:
        """Send no more of the prefetches `dropped`, and nothing into the lent slots of the layers `closed`."""
        if dropped:
            for lane in self.lanes:
                lane.queue.abort(dropped)
        for layer in closed:
            if layer in self.lane_of:
                self.lane_of[layer].queue.close_buffer(layer)

    def feed_links(self) -> None:
        """Send what waits, as far as there is room and the CPU share is not done."""
        for lane in self.lanes:
            if lane.queue.waiting:
                try:
                    lane.queue.pump(self._cpu_is_computing if self._cpu_busy else None)
                except DEVICE_ERRORS as error:
                    raise AcceleratorFailed(lane, error) from error

    def join(self, plan: Plan, step: Step, into: torch.Tensor | None = None) -> torch.Tensor:
        """Wait for the CPU share and enqueue the sum; `[num_tokens, hidden]` in the model's dtype and place.

        `into` as of `Lane.finish`; what the CPU alone answers does not go there.
        """
        self.feed_links()
        is_own = self._answered is not None
        answer = self._wait_cpu(self.feed_links, plan.makespan_s) if plan.cpu else None
        lane = self.lane_of.get(plan.layer)
        if lane is None:
            assert answer is not None, "a plan computes at least one expert"
            return _to_model(answer, step.routed.hidden, is_own=is_own)
        try:
            return lane.finish(step, answer, has_gpu=bool(plan.gpu), into=into)
        except DEVICE_ERRORS as error:
            raise AcceleratorFailed(lane, error) from error

    def wait(self, event: Event, what: str) -> None:
        """Wait for an accelerator to come to `event`."""
        self._deadline.wait(event.is_done, what)

    def compute_on_cpu(self, layer: int, step: Step) -> torch.Tensor:
        """Compute a whole step on the CPU, with plain copies: what is left when an accelerator fails."""
        lane = self.lane_of.get(layer)
        if lane is not None:
            lane.queue.close_plan()
        self.settle_cpu()
        if self._cpu_is_dead:
            raise self._dead()
        if self.log is not None:
            self._submitted = layer, tuple(dict.fromkeys(step.host.ids.flatten().tolist())), time.perf_counter()
        self.cpu.submit(layer, step.host)
        self._cpu_busy = True
        return _to_model(self._wait_cpu(None), step.routed.hidden)

    def give_up_cpu(self) -> None:
        """A share that others have asked for has not come back: the backend is never asked again."""
        self._cpu_is_dead = True

    def settle_cpu(self) -> None:
        """Let a submitted CPU share end and forget it, after something else of the step has failed."""
        if self._cpu_busy:
            self._wait_cpu(None)

    def _wait_cpu(self, meanwhile: Callable[[], object] | None, predicted_s: float = 0.0) -> torch.Tensor:
        if self._answered is not None:
            answer, self._answered, self._cpu_busy = self._answered, None, False
            ended = time.perf_counter()
            if self.log is not None:
                self.log.computed(*self._submitted, ended)
            self.cpu_share_s, self.cpu_was_waited_for = ended - self._cpu_began_s, True
            return answer
        began, predicted_s = time.perf_counter(), max(predicted_s, 1e-9)
        rest_s = SHARE_SLEPT * self._cpu_pace * predicted_s
        self.cpu_was_waited_for = False

        def between_polls() -> None:
            self.cpu_was_waited_for = True
            if meanwhile is not None:
                meanwhile()

        try:
            if not self.cpu.is_done():
                self._deadline.wait(self.cpu.is_done, self._cpu_name, between_polls, rest_s)
        except DeadlineError:
            self._cpu_is_dead = True
            raise
        except RuntimeError as error:
            raise KernelError(f"{self._cpu_name} failed: {error}") from error
        finally:
            self._cpu_busy = False
        ended = time.perf_counter()
        if self.log is not None:
            self.log.computed(*self._submitted, ended)
        self.cpu_share_s = ended - self._cpu_began_s
        self._cpu_pace += 0.2 * ((ended - began) / predicted_s - self._cpu_pace)
        return self.cpu.wait()

    def _dead(self) -> KernelError:
        return KernelError(f"{self._cpu_name} has not come back; restart the program")

    def _only(self, routed: Routed, experts: tuple[int, ...]) -> Routed:
        """Return it with the id of every expert that is not in `experts` replaced by -1; valid until the next call."""
        ids = routed.ids
        if ids.shape[0] > 1:
            mine = torch.tensor(experts, dtype=ids.dtype)
            return Routed(routed.hidden, torch.where(torch.isin(ids, mine), ids, -1), routed.weights)
        if self._mine.shape != ids.shape:
            self._mine = torch.empty_like(ids)
            self._mine_values = memoryview(self._mine.numpy()[0])
        values = self._mine_values
        for place, index in enumerate(ids.tolist()[0]):
            values[place] = index if index in experts else -1
        return Routed(routed.hidden, self._mine, routed.weights)

    def _cpu_is_computing(self) -> bool:
        return not self.cpu.is_done()


def _to_model(answer: torch.Tensor, hidden: torch.Tensor, *, is_own: bool = False) -> torch.Tensor:
    """An answer of the CPU backend, pairs or sum, in memory of its own, as the model has `hidden`.

    `is_own`: it has such memory, and is no buffer.
    """
    if answer.dim() == 3:
        answer, is_own = answer.sum(dim=1), True
    if is_own and hidden.is_cpu and hidden.dtype is torch.float32:
        return answer
    return answer.to(hidden, copy=not is_own)
