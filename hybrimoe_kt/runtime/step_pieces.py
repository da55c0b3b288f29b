"""A token's way through a model in captured pieces: each up to where a layer's experts have to be decided on.

Or a token's of each of several texts, all in one step: then every layer ends a piece, also one whose experts are all
resident, as launches of several tokens depend on what is routed.

While the model's own code runs, this stands in the runtime's place: at a layer's experts a piece ends, the layer is
computed for good, and the next piece begins with its answer. From then on the code is not needed any more.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from hybrimoe_kt.device.accelerator import Accelerator
from hybrimoe_kt.device.backend import Routed
from hybrimoe_kt.device.executor import DEVICE_ERRORS
from hybrimoe_kt.device.lane import Lane
from hybrimoe_kt.device.sent_routing import SentRouting
from hybrimoe_kt.device.step_graph import StepGraph, StepLost

from .device_planner import DevicePlanner
from .job import Job
from .runtime import Runtime

__all__ = ["StepPieces"]


@dataclass(slots=True)
class _Piece:
    """What is replayed, and the layer step behind it; none behind the last."""

    graph: StepGraph | None = None
    whole: dict[int, torch.Tensor] = field(default_factory=dict)
    """Layers computed within it, whose experts are all resident -> the table of their slots that it reads."""
    layer: int = -1
    routed: Routed | None = None
    sent: SentRouting | None = None
    writes: tuple[torch.Tensor, ...] = ()
    """What of it others read."""


class StepPieces:
    """For a model that stands on one device, which `accelerator` is or stands for.

    First an ordinary step, with this in the runtime's place, then one between `begin_capture` and `end_capture`; then
    `replay`.
    """

    def __init__(self, runtime: Runtime, accelerator: Accelerator) -> None:
        self._runtime, self._accelerator = runtime, accelerator
        self._capture = accelerator.capture()
        self._is_capturing = False
        self._sent: dict[int, SentRouting] = {}
        self._answer: torch.Tensor | None = None
        self._pieces: list[_Piece] = []
        self._done = accelerator.event()
        self._number = torch.empty(0)
        """Of the step, int64 `[1]` on the device."""
        self._num_steps = 0
        self._listens = self._listening()
        self._revision = -1
        self._planner = runtime.device_planner
        self._is_planned = False
        """Whether steps are planned on the device: such a step has been enqueued."""
        self._was_planned: dict[int, bool] = {}
        """Of the last step that was not captured, by layer: whether the device planned it; else it was whole."""
        self._is_cut_too_often = False
        """Whether a layer behind a piece has become whole, which could be within it."""

    # In the runtime's place.

    @property
    def wants_scores(self) -> bool:
        """See `Runtime`."""
        return self._runtime.wants_scores

    def begin(self, layer: int, routed: Routed) -> Job:
        """See `Runtime`. What follows, up to `finish`, is in the same piece."""
        runtime, lane = self._runtime, self._lane(layer, routed)
        planner = self._planner
        if planner is not None and lane is planner.lane and len(routed.ids) == 1:
            is_planned = not runtime.is_whole(layer, 1)
            if not self._is_capturing:
                self._was_planned[layer] = is_planned
            if is_planned:
                return self._begin_planned(planner, layer, routed)
        if not self._is_capturing:
            if lane is not None and layer not in self._sent:
                if not len(self._number):
                    self._number = torch.zeros(1, dtype=torch.int64, device=routed.hidden.device)
                plain, scores = _plain(routed), runtime.scores(routed)
                first = self._sent[layer] = lane.readback.sending(plain, scores, self._number)
                if self._capture is not None:
                    first.send(plain, scores, self._capture)  # once, so that its kernels are there for the capture
            if self._answer is None:
                self._answer = torch.empty_like(routed.hidden)
            return runtime.begin(layer, routed)
        assert self._capture is not None, "asked for"
        piece, job = self._pieces[-1], Job(layer)
        plain = _plain(routed)
        if lane is not None and len(plain.ids) == 1 and runtime.is_whole(layer, 1):
            slot_of = runtime.coordinator.slots_of(layer)
            if lane.has_whole(layer, slot_of):
                runtime.coordinator.pass_over(layer, 1)
                piece.whole[layer] = lane.whole.table(layer, slot_of)[1]
                job.answer = lane.capture_whole(layer, slot_of, plain)
                return job
        piece.layer, piece.routed, piece.writes = layer, plain, plain[:3]
        sent = self._sent.get(layer)
        if sent is not None and lane is not None:
            sent.send(plain, runtime.scores(routed), self._capture)
            piece.sent, piece.routed = sent, sent.routed._replace(logits=routed.logits)
            piece.writes = *sent.routed[:3], sent.memory
        return job

    def _begin_planned(self, planner: DevicePlanner, layer: int, routed: Routed) -> Job:
        """All of a layer's step is enqueued, whatever the device will decide; no piece ends."""
        if self._answer is None:
            self._answer = torch.empty_like(routed.hidden)
        if not planner.is_open:
            planner.begin_step()
        self._is_planned = True
        job = Job(layer)
        scores = self._runtime.scores(routed)
        job.answer = planner.enqueue(layer, _plain(routed), scores, is_told=self._runtime.wants_plans)
        return job

    def finish(self, job: Job) -> torch.Tensor:
        """See `Runtime`."""
        if not self._is_capturing:
            return self._runtime.finish(job)
        if job.answer is not None:
            return job.answer
        assert self._capture is not None, "asked for"
        piece = self._pieces[-1]
        piece.graph = self._capture.end()
        self._note_sent(piece)
        answer = self._compute(piece)
        self._runtime.settle()
        self._wait()  # the model's own code goes on with it, perhaps on the host
        self._accelerator.on_host("result", reads=(answer,))
        self._pieces.append(_Piece())
        self._capture.begin()
        return answer

    def _lane(self, layer: int, routed: Routed) -> Lane | None:
        """The accelerator that computes the layer, where that is the model's own."""
        lane = self._runtime.executor.lane_of.get(layer)
        return lane if lane is not None and lane.accelerator is self._accelerator else None

    # From step to step.

    @property
    def can_capture(self) -> bool:
        """Whether a step can be captured now: one has been computed before, each layer in the way it would go now."""
        if self._capture is None or self._answer is None:
            return False
        return all(self._goes_as_before(layer, is_planned) for layer, is_planned in self._was_planned.items())

    def _goes_as_before(self, layer: int, is_planned: bool) -> bool:
        """Whether all is there that a layer's part of a planned step needs: none of it is made within a capture."""
        runtime = self._runtime
        if is_planned or not runtime.is_whole(layer, 1):
            return is_planned and not runtime.is_whole(layer, 1)
        lane = runtime.executor.lane_of[layer]
        return lane.has_whole(layer, runtime.coordinator.slots_of(layer))

    def begin_capture(self) -> None:
        """Capture what the model enqueues from now on; CaptureError where that cannot be."""
        assert not self._is_capturing, "one step at a time"
        self._pieces.clear()
        self._revision, self._is_cut_too_often = -1, False
        self._capture = self._accelerator.capture()  # the last one's memory goes with it
        assert self._capture is not None, "asked for"
        self._count_step()
        if self._planner is not None and self._is_planned:
            self._planner.begin_step()
        self._capture.begin()
        self._pieces, self._is_capturing = [_Piece()], True

    def end_capture(self) -> None:
        """The last piece ends here."""
        assert self._capture is not None and self._is_capturing, "begun before"
        self._is_capturing = False
        if self._planner is not None and self._is_planned:
            self._planner.join_streams()
        self._pieces[-1].graph = self._capture.end()

    def end_planned(self) -> None:
        """Wait for a step that the device has planned, in whatever way it was enqueued; StepLost where it failed."""
        if self._planner is not None and self._planner.is_open:
            self._planner.join_streams()
            self._end_step(self._planner)

    def abort(self) -> None:
        """Forget the step that was being captured, after an error in it."""
        self._is_capturing = False
        self._pieces.clear()
        if self._capture is not None:
            self._capture.abort()
        if self._planner is not None:
            self._planner.abandon()

    @property
    def num_pieces(self) -> int:
        """Of the step that was captured."""
        return len(self._pieces)

    def serves(self, runtime: Runtime) -> bool:
        """Whether it was made for `runtime` as that is now: scores are wanted as before."""
        is_same = self._runtime is runtime and self._planner is runtime.device_planner
        return is_same and self._listens == self._listening()

    def is_valid(self) -> bool:
        """Whether what was captured is still how a step goes: whole layers are those, each expert in its slot."""
        if self._is_cut_too_often:
            return False
        revision = self._runtime.coordinator.revision
        if revision != self._revision:
            if not all(self._reads(*whole) for piece in self._pieces for whole in piece.whole.items()):
                return False
            self._revision = revision
        return True

    def _check_slots(self, piece: _Piece) -> None:
        is_known = not piece.whole or self._runtime.coordinator.revision == self._revision
        if not (is_known or all(self._reads(*whole) for whole in piece.whole.items())):
            raise StepLost("slots are gone that the rest of the step reads")

    def _reads(self, layer: int, table: torch.Tensor) -> bool:
        """Whether a whole layer is one now, whose slots are those in `table`."""
        if not self._runtime.is_whole(layer, 1):
            return False
        lane, slot_of = self._runtime.executor.lane_of[layer], self._runtime.coordinator.slots_of(layer)
        return lane.has_whole(layer, slot_of) and lane.whole.table(layer, slot_of)[1] is table

    def _listening(self) -> tuple[bool, bool]:
        """What decides whether scores are sent, and how, and whether a layer can be passed over."""
        return self._runtime.wants_scores, self._runtime.is_listened_to

    def replay(self) -> None:
        """Go through all pieces and layers once more; returns when the device has done so.

        StepLost where a failure on the way takes slots that the rest of the step reads.
        """
        runtime, accelerator, now = self._runtime, self._accelerator, time.perf_counter
        answer = self._answer
        assert answer is not None, "a step was captured"
        self._count_step()
        if self._planner is not None and self._is_planned:
            self._replay_planned(self._planner)
            return
        for piece in self._pieces:
            began = now()
            assert piece.graph is not None, "captured"
            self._check_slots(piece)
            accelerator.replay(piece.graph, reads=(answer,), writes=piece.writes)
            self._note_sent(piece)
            runtime.note_replay(piece.layer, began)
            runtime.settle()  # the device has work meanwhile
            for layer in piece.whole:
                runtime.coordinator.pass_over(layer, 1)
            runtime.seconds.steps += len(piece.whole)
            runtime.feed_links()
            if piece.layer >= 0:
                self._compute(piece)
        self._wait()

    def _replay_planned(self, planner: DevicePlanner) -> None:
        """All of the step is one piece, but for layers computed within it because all of their experts are there."""
        runtime, answer = self._runtime, self._answer
        assert answer is not None, "a step was captured"
        [piece] = self._pieces
        assert piece.graph is not None, "captured"
        began = time.perf_counter()
        self._check_slots(piece)
        planner.begin_step()
        try:
            self._accelerator.replay(piece.graph, reads=(answer,), writes=())
        except DEVICE_ERRORS as error:
            planner.lose(error)
        runtime.note_replay(-1, began)
        for layer in piece.whole:
            runtime.coordinator.pass_over(layer, 1)
        runtime.seconds.steps += planner.num_layers
        self._end_step(planner)

    def _end_step(self, planner: DevicePlanner) -> None:
        began = time.perf_counter()
        planner.end_step()
        if self._runtime.wants_plans:
            self._runtime.note_planned(planner.steps(), began)

    def _note_sent(self, piece: _Piece) -> None:
        if piece.sent is not None:
            piece.sent.expected = self._num_steps
            self._accelerator.compute.record(piece.sent.piece_done, "routing read")

    def _count_step(self) -> None:
        self._num_steps += 1
        if len(self._number):
            self._number.fill_(self._num_steps)

    def _wait(self) -> None:
        self._accelerator.compute.record(self._done, "step")
        self._runtime.end_replay(self._accelerator, self._done)

    def _compute(self, piece: _Piece) -> torch.Tensor:
        assert piece.routed is not None and self._answer is not None, "of a layer with experts"
        if piece.sent is None or piece.layer not in self._runtime.executor.lane_of:
            self._wait()  # the host reads the device's own tensors
        job = self._runtime.begin(piece.layer, piece.routed, piece.sent)
        if job.plan is None and job.answer is not None and piece.sent is not None and len(piece.routed.ids) == 1:
            self._is_cut_too_often = True
        if piece.sent is None:  # another accelerator's, perhaps, on whose stream the next piece is not
            return self._answer.copy_(self._runtime.finish(job))
        return self._runtime.finish(job, self._answer)


def _plain(routed: Routed) -> Routed:
    """Its tensors in one piece each, ids int64, weights float32."""
    hidden, ids, weights = routed[:3]
    return Routed(
        hidden.contiguous(), ids.long().contiguous(), weights.float().contiguous(), routed.logits, routed.phase
    )
