"""One accelerator at work: its slots, its link, its experts' kernels, and the buffers a step passes through."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import NamedTuple

import torch

from hybrimoe_kt.core.types import Plan, Transfer
from hybrimoe_kt.errors import DeadlineError, KernelError

from .accelerator import Accelerator
from .activity import Watcher
from .backend import GpuBackend, Routed
from .host_store import HostStore
from .readback import Readback, Step
from .slot_tables import SlotTables
from .slots import LayerSlots, SlotPool
from .step_graph import CapturedWork
from .transfers import TransferQueue
from .waiting import Deadline
from .whole import WholeLayers

__all__ = ["Lane", "Views"]

logger = logging.getLogger(__name__)

_NOTHING = Routed(torch.empty(0), torch.empty(0), torch.empty(0))
_PLACE, _PAIRS = itemgetter(1), itemgetter(2)
"""Of an expert and its place, and of a `_Launch`; as functions of C they cost a step no calls."""
_MOST_IN_A_ROW = 3
_MOST_OF_STEPS = 8, 64
"""Failures, of so many steps in a row, that say a device will not recover, though steps between succeed: a choice."""


class Lane:
    """Everything of one accelerator, allocated once. Calls only enqueue, except where they say they wait."""

    def __init__(
        self,
        accelerator: Accelerator,
        gpu: GpuBackend,
        store: HostStore,
        slots: Mapping[int, int],
        *,
        num_buffer_slots: Mapping[int, int] | None = None,
        max_tokens: int,
        cpu_answers_pairs: bool,
        chunk_bytes: int,
        deadline: Deadline,
        whole_bytes: int = 0,
    ) -> None:
        """`slots` maps this accelerator's layers -> number of slots, 0 for those that stay on the CPU.

        `num_buffer_slots` maps layers -> slots lent to them in the two buffers that prompts stream through.
        """
        self.accelerator, self.gpu, self._store, self._deadline = accelerator, gpu, store, deadline
        self.layers = tuple(sorted(slots))
        self.pool = SlotPool(accelerator, store.layouts, slots, num_buffer_slots)
        self.queue = TransferQueue(
            accelerator, store, self.pool, chunk_bytes=chunk_bytes, deadline=deadline, whole_bytes=whole_bytes
        )
        shapes = [store.layers[layer] for layer in slots]
        hidden = max(experts.hidden for experts in shapes)
        top_k = max(experts.top_k for experts in shapes)
        self._num_experts = max(experts.num_experts for experts in shapes)
        self.readback = Readback(
            accelerator,
            max_tokens=max_tokens,
            hidden=hidden,
            top_k=top_k,
            num_experts=self._num_experts,
            deadline=deadline,
        )
        for layer, layer_slots in self.pool.groups:
            experts = dataclasses.replace(store.layers[layer], layer=layer_slots.key)
            gpu.add_layer(experts, layer_slots.layout, layer_slots.memory)
        gpu.prepare(max_tokens)
        self._pairs, self._cpu_pairs = gpu.answers_pairs, cpu_answers_pairs
        rows = max_tokens * hidden * 4
        self._out = accelerator.allocate(rows * (top_k if self._pairs else 1)).view(torch.float32)
        self._sum = accelerator.allocate(rows).view(torch.float32)
        self._cpu_out = accelerator.allocate(rows * (top_k if cpu_answers_pairs else 1)).view(torch.float32)
        self._outbox = [accelerator.page_locked(self._cpu_out.numel() * 4).view(torch.float32) for _ in range(2)]
        self._weights = accelerator.allocate(max_tokens * top_k * 4).view(torch.float32)
        self._turn = 0
        self._shaped: Views | None = None
        self._tables = SlotTables(accelerator, self._num_experts)
        self.whole = WholeLayers(accelerator, self.layers, self._num_experts, self._tables)
        self._capture = accelerator.capture()
        self._captures_launches = self._capture is not None and gpu.decides_on_device
        """Whether a captured step's first launch is captured, too."""
        self._result = accelerator.event()
        self._num_steps = 0
        self._in_a_row = 0
        self._failed_at: deque[int] = deque(maxlen=_MOST_OF_STEPS[0])
        self.log: Watcher | None = None
        self.number = 0
        """Of this accelerator in the log."""

    def log_to(self, log: Watcher | None, number: int) -> None:
        """Write down from now on what is launched here and copied, as accelerator and link `number`; None: stop."""
        self.log = self.queue.log = log
        self.number = self.queue.number = number

    def note_success(self) -> None:
        """A step of this accelerator has been joined."""
        self._num_steps += 1
        self._in_a_row = 0

    def note_failure(self) -> bool:
        """A step has failed; True if there have been too many for it to be asked again."""
        self._num_steps += 1
        self._in_a_row += 1
        self._failed_at.append(self._num_steps)
        most, steps = _MOST_OF_STEPS
        often = len(self._failed_at) == most and self._num_steps - self._failed_at[0] < steps
        return often or self._in_a_row >= _MOST_IN_A_ROW

    def read(self, routed: Routed, scores: torch.Tensor | None = None) -> Step:
        """Bring the routing to the host: the one wait of every step that decides anything."""
        return self.readback.read(self._compact(routed), scores)

    def run_whole(self, layer: int, slot_of: Sequence[int], routed: Routed) -> torch.Tensor:
        """Compute a step of a layer whose experts all have a slot, whatever was routed; only enqueues.

        Returns `[num_tokens, hidden]` as `finish` does.
        """
        step = Step(self._compact(routed), _NOTHING)
        slots = self.pool.layers[layer]
        slots.begin_step()
        pairs, table = self.whole.table(layer, slot_of)
        self._launch(layer, _Launch(slots, (), pairs), table, step, self._views(step).out, is_first=True)
        self.whole.count(layer, step.routed.ids)
        return self.finish(step, None, has_gpu=True)

    def has_whole(self, layer: int, slot_of: Sequence[int]) -> bool:
        """Whether all that a captured step of a whole layer reads is there: its table, and every expert."""
        return not self.pool.layers[layer].unsettled and self.whole.is_ready(layer, slot_of)

    def capture_whole(self, layer: int, slot_of: Sequence[int], routed: Routed) -> torch.Tensor:
        """Do as `run_whole` within a step that is being captured; its table has been sent before.

        `routed` has its tensors in one piece each, weights in float32.
        """
        slots, views = self.pool.layers[layer], self._views(Step(routed, _NOTHING))
        pairs, table = self.whole.table(layer, slot_of)
        result = torch.empty_like(routed.hidden)
        self.gpu.launch_first(slots.key, pairs, table, routed, views.out)
        self.whole.capture_count(layer, routed.ids)
        _combine(views.out, None, views.total, result)
        return result

    def planned_views(self, routed: Routed) -> Views:
        """The buffers of a step that a device has planned, `routed` in one piece each."""
        return self._views(Step(routed, _NOTHING))

    def combine_planned(self, views: Views, result: torch.Tensor) -> None:
        """Add both shares of such a step into `result`; only enqueues."""
        _combine(views.out, views.cpu, views.total, result)

    def _compact(self, routed: Routed) -> Routed:
        """Its tensors in one piece each, weights in float32."""
        weights = routed.weights
        weights = weights.contiguous() if weights.dtype == torch.float32 else self._widened(weights)
        return Routed(routed.hidden.contiguous(), routed.ids.contiguous(), weights)

    def _widened(self, weights: torch.Tensor) -> torch.Tensor:
        wide, narrow = self._weights[: weights.numel()].view(weights.shape), weights

        def widen() -> None:
            wide.copy_(narrow)

        self.accelerator.launch(self.accelerator.compute, widen, reads=(narrow,), writes=(wide,), site="widen weights")
        return wide

    def run(self, plan: Plan, step: Step) -> None:
        """Enqueue the plan's transfers and its GPU experts: the resident at once, each other when it has arrived."""
        queue, layer, slot_of = self.queue, plan.layer, plan.slots
        own = self.pool.layers[layer]
        queue.in_use_layer, queue.in_use = layer, slot_of.values()
        through_slots = bool(plan.transfers) and len(set(slot_of.values())) < len(plan.gpu)
        queue.open_layer = -1 if through_slots else layer
        own.begin_step()
        if not plan.transfers and layer not in self.pool.buffers and own.unsettled.isdisjoint(slot_of.values()):
            launches = [_Launch(own, plan.gpu, list(slot_of.items()))]
        else:
            launches = _launches(plan, self.pool, queue, one_by_one=through_slots)
        # All tables in one copy, before the transfers: behind them it would hold up the resident experts.
        tables = self._tables.send(list(map(_PAIRS, launches)))
        out = self._views(step).out
        is_replayed = step.sent is not None and self._captures_launches and launches[0].slots is own
        is_replayed &= len(step.routed.ids) == 1  # several tokens' launches depend on what is in the slots
        if queue.waiting and layer in queue.direct:
            self._hasten(plan)
        if plan.transfers:
            self._feed(plan, launches, through_slots, step, out, tables, is_replayed=is_replayed)
            return
        for number, (launch, table) in enumerate(zip(launches, tables, strict=True)):
            is_first = number == 0
            self._launch(layer, launch, table, step, out, is_first=is_first, is_replayed=is_replayed and is_first)

    def _feed(
        self,
        plan: Plan,
        launches: Sequence[_Launch],
        through_slots: bool,
        step: Step,
        out: torch.Tensor,
        tables: Sequence[torch.Tensor],
        *,
        is_replayed: bool,
    ) -> None:
        """Launch group by group, and start the transfers between them.

        The resident experts are launched first: that is quicker than giving the link its work. Direct transfers are
        then all enqueued; staging takes the host's time, so no more than the next group needs is staged.
        """
        waiting, direct = deque(plan.transfers), plan.layer in self.queue.direct
        position = {expert: number for number, expert in enumerate(plan.gpu)} if through_slots else {}
        for number, (launch, table) in enumerate(zip(launches, tables, strict=True)):
            while waiting and ((direct and number > 0) or any(t.expert.index in launch.experts for t in waiting)):
                if through_slots and not _is_read(plan, position, waiting[0], number):
                    break
                self.queue.start(waiting.popleft())
            is_first = number == 0
            self._launch(plan.layer, launch, table, step, out, is_first=is_first, is_replayed=is_replayed and is_first)

    def _hasten(self, plan: Plan) -> None:
        """Send what the plan counts on being there before its own transfers: the GPU's order has it first."""
        arriving = {transfer.slot for transfer in plan.transfers}
        self.queue.hasten(plan.layer, [slot for slot in plan.slots.values() if slot not in arriving])

    def _launch(
        self,
        layer: int,
        launch: _Launch,
        table: torch.Tensor,
        step: Step,
        out: torch.Tensor,
        *,
        is_first: bool,
        is_replayed: bool = False,
    ) -> None:
        """Enqueue experts of `layer` after what is under way into their slots; `table` says on the device which.

        What `is_first` finds anything in `out`.
        """
        slots, pairs = launch.slots, launch.pairs
        if slots.unsettled:
            for _, place in pairs:
                if place in slots.unsettled:
                    self.queue.settle(layer, slots.first + place)
        is_whole = len(pairs) == len(slots.views)
        reads = [slots.memory] if is_whole else list(map(slots.views.__getitem__, map(_PLACE, pairs)))
        reads += (table, *step.routed[:3])

        enqueue = self.gpu.launch_first if is_first else self.gpu.launch

        def launched() -> None:
            enqueue(slots.key, pairs, table, step.routed, out)

        work: Callable[[], object] = launched
        if is_replayed and step.sent is not None and self._capture is not None:
            if step.sent.resident is None or step.sent.resident[0] is not slots:
                step.sent.resident = slots, CapturedWork(self._capture, launched)
            captured = work = step.sent.resident[1]
            captured.renew(launched)
        compute = self.accelerator.compute
        before = self.accelerator.stamp(compute) if self.log is not None and self.log.is_open else None
        self.accelerator.launch(compute, work, reads=reads, writes=(out,), site="experts")
        if before is not None and self.log is not None:
            self.log.launched(self.number, layer, launch.experts, before, self.accelerator.stamp(compute))
        compute.record(slots.read_done, "readers")

    def finish(
        self, step: Step, cpu_answer: torch.Tensor | None, *, has_gpu: bool, into: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Enqueue the sum of both shares; returns `[num_tokens, hidden]` in the model's dtype, on its device.

        Waits only where the model does not run on this accelerator's stream (emulated devices), and not for what goes
        `into` memory of the caller's, who then runs on that stream or waits.
        """
        accelerator, views = self.accelerator, self._views(step)
        self.queue.close_plan()
        result = torch.empty_like(step.routed.hidden) if into is None else into
        out = views.out if has_gpu else None
        cpu = self._send(views, cpu_answer) if cpu_answer is not None else None
        reads = [] if out is None else [out]
        if cpu is not None:
            reads.append(cpu)

        def combined() -> None:
            _combine(out, cpu, views.total, result)

        work: Callable[[], object] = combined
        if into is not None and step.sent is not None and self._capture is not None:
            joins, shares = step.sent.joins, (has_gpu, cpu is not None)
            if shares not in joins:
                joins[shares] = CapturedWork(self._capture, combined)
            work = joins[shares]
        accelerator.launch(accelerator.compute, work, reads=reads, writes=(views.total, result), site="join")
        if into is None:
            accelerator.compute.record(self._result, "result")
            accelerator.hand_over(self._result, self._deadline.wait)
            accelerator.on_host("result", reads=(result,))
        self.note_success()
        return result

    def _send(self, views: Views, answer: torch.Tensor) -> torch.Tensor:
        """Bring the CPU's answer to the device through the outbox."""
        self._turn ^= 1
        box = views.boxes[self._turn]
        self.accelerator.on_host("fill outbox", reads=(answer,), writes=(box,))
        box.copy_(answer)
        self.accelerator.copy(self.accelerator.compute, views.cpu, box, "CPU answer to device")
        return views.cpu

    def _views(self, step: Step) -> Views:
        """The buffers shaped for a step; made again only when the shape changes."""
        num_tokens, top_k = step.routed.ids.shape
        hidden = step.routed.hidden.shape[1]
        known = self._shaped
        if known is not None and known.shape == (num_tokens, top_k, hidden):
            return known
        sums, pairs = (num_tokens, hidden), (num_tokens, top_k, hidden)
        cpu = pairs if self._cpu_pairs else sums
        self._shaped = made = Views(
            pairs,
            _shaped(self._out, pairs if self._pairs else sums),
            _shaped(self._sum, sums),
            _shaped(self._cpu_out, cpu),
            (_shaped(self._outbox[0], cpu), _shaped(self._outbox[1], cpu)),
        )
        return made

    def doubtful_slots(self) -> set[tuple[int, int]]:
        """Layer and slot of everything that may not have arrived; what has not been sent is not sent any more."""
        self.queue.close_plan()
        return self.queue.doubtful_slots()

    def drain(self) -> None:
        """Wait until nothing is under way; DeadlineError if that does not end. Failures met here are known already."""
        for stream in (self.accelerator.compute, self.readback.gates, *self.queue.streams):
            event = self.accelerator.event()
            stream.record(event, "drained")
            try:
                self._deadline.wait(event.is_done, f"what {self.accelerator.name} was still doing")
            except DeadlineError:
                raise
            except (RuntimeError, KernelError):
                logger.debug("found while draining", exc_info=True)

    def resize(self, layer: int, num_slots: int) -> None:
        """Replace a layer's slots by `num_slots` empty ones; everything on the lane has been drained."""
        self.queue.drop_layer(layer)
        fresh = self.pool.resize(layer, num_slots)
        if fresh is not None:
            self.gpu.add_layer(self._store.layers[layer], fresh.layout, fresh.memory)


class _Launch(NamedTuple):
    """Experts of a plan that are computed together, of the same memory."""

    slots: LayerSlots
    experts: tuple[int, ...]
    pairs: list[tuple[int, int]]
    """The experts, each with its place in `slots`."""


class Views(NamedTuple):
    """A lane's buffers as one shape of step sees them."""

    shape: tuple[int, int, int]
    out: torch.Tensor
    total: torch.Tensor
    cpu: torch.Tensor
    boxes: tuple[torch.Tensor, torch.Tensor]


def _shaped(memory: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return memory[: math.prod(shape)].view(shape)


def _combine(out: torch.Tensor | None, cpu: torch.Tensor | None, total: torch.Tensor, result: torch.Tensor) -> None:
    """Write the sum of both answers, pairs `[T, K, H]` or sums `[T, H]`, to `result [T, H]`; `total` is scratch.

    Pairs of both sides are added before they are summed: each is zero where the other computed, so that is exact.
    """
    if out is not None and cpu is not None and out.dim() == cpu.dim() == 3:
        out.add_(cpu)
        cpu = None
    first, second = (out, cpu) if out is not None else (cpu, None)
    assert first is not None, "a plan computes at least one expert"
    if first.dim() == 3:
        torch.sum(first, dim=1, out=total)
        first = total
    if second is None:
        result.copy_(first)
    else:
        torch.add(first, second.sum(dim=1) if second.dim() == 3 else second, out=result)  # rounded once, when stored


def _launches(plan: Plan, pool: SlotPool, queue: TransferQueue, *, one_by_one: bool) -> list[_Launch]:
    """What can be launched together: everything resident first, then each arrival by itself, or all `one_by_one`.

    Experts in buffer slots stand in other memory than the layer's own, so they are launched on their own.
    """
    arriving = {transfer.slot for transfer in plan.transfers} | queue.slots_waiting(plan.layer)
    own, is_plain = pool.layers[plan.layer], plan.layer not in pool.buffers
    ready: dict[int, _Launch] = {}
    late: list[_Launch] = []
    for expert in plan.gpu:
        slot = plan.slots[expert]
        slots, place = (own, slot) if is_plain else pool.locate(plan.layer, slot)
        alone = _Launch(slots, (expert,), [(expert, place)])
        if one_by_one or slot in arriving or (place in slots.unsettled and not slots.written[place].is_done()):
            late.append(alone)
        else:
            before = ready.get(slots.key)
            joined = alone if before is None else _Launch(slots, (*before.experts, expert), before.pairs + alone.pairs)
            ready[slots.key] = joined
    return [*ready.values(), *late]


def _is_read(plan: Plan, position: Mapping[int, int], transfer: Transfer, num_launched: int) -> bool:
    """Whether every expert of the plan that uses the transfer's slot before it has been launched."""
    before = plan.gpu[num_launched : position[transfer.expert.index]]
    return all(plan.slots[expert] != transfer.slot for expert in before)
