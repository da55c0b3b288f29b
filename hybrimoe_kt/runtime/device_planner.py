"""Tokens that a device plans by itself: every layer's decisions are kernels of one captured step.

The host computes the CPU's share when the device asks for it, and nothing else. Prompts, and steps of several tokens,
are planned on the host as ever; the two hand each other slots and scores. What fails costs the step, one warning, and
this planner: from then on the host plans.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import NoReturn

import torch

from hybrimoe_kt.backends.step_planning import StepPlanning
from hybrimoe_kt.backends.word_wait import word_wait
from hybrimoe_kt.config import ExpertOptions
from hybrimoe_kt.core.coordinator import Coordinator
from hybrimoe_kt.core.device_coordinator import DeviceTables, rules_of
from hybrimoe_kt.core.device_counts import DeviceCounts
from hybrimoe_kt.device.backend import Routed
from hybrimoe_kt.device.executor import DEVICE_ERRORS, AcceleratorFailed, Executor
from hybrimoe_kt.device.lane import Lane
from hybrimoe_kt.device.readback import Predict
from hybrimoe_kt.device.shares.service import ShareService
from hybrimoe_kt.device.shares.stream_waits import StreamWait, choose_wait
from hybrimoe_kt.device.shares.words import SharePosts
from hybrimoe_kt.device.step_graph import StepLost
from hybrimoe_kt.device.waiting import Deadline
from hybrimoe_kt.errors import DeadlineError, KernelError, first_line

from .experts import ModelExperts
from .planned_layers import PlannedLayers
from .planned_steps import PlannedStep, Seen, planned_step
from .recovery import Recovery

__all__ = ["DevicePlanner"]

logger = logging.getLogger(__name__)


class DevicePlanner:
    """For a model whose layers are all one lane's. Not thread-safe.

    Per token `begin_step`, then `enqueue` for every layer, or a replay of what that has captured, then `end_step`.
    Between tokens `give_back` lets the host plan.
    """

    def __init__(
        self,
        experts: ModelExperts,
        coordinator: Coordinator,
        executor: Executor,
        gates: Mapping[int, Predict],
        recovery: Recovery,
        feedback: Callable[[int, int, float], object],
        *,
        forks: bool | None = None,
    ) -> None:
        """`gates` maps layers -> what asks the gates behind them, as far as is known when a step is enqueued.

        `feedback` is told, between tokens, of each share that the CPU has computed: layer, experts, seconds.
        """
        self._store, self._coordinator, self._executor = experts.store, coordinator, executor
        self._gates, self._recovery, self._feedback = gates, recovery, feedback
        self._shares: dict[int, tuple[int, float, float]] = {}
        """Of the last token, by layer: how many experts, begun, ended."""
        self._seen: dict[int, Seen] = {}
        self.lane: Lane = executor.lanes[0]
        options: ExpertOptions = experts.options
        self._layers = self.lane.layers
        self._place = {layer: place for place, layer in enumerate(self._layers)}
        known = coordinator.layers()
        shapes = [self._store.layers[layer] for layer in self._layers]
        self._hidden, self._top_k = shapes[0].hidden, shapes[0].top_k
        classes = {id(cost): number for number, cost in enumerate({id(cost): cost for _, cost in known}.values())}
        self._class_of = [classes[id(cost)] for _, cost in known]
        accelerator = self.lane.accelerator
        self._planning = StepPlanning(
            accelerator.device, rules_of(options.strategy), num_experts=shapes[0].num_experts, top_k=self._top_k,
            num_slots=[len(self.lane.pool.layers[layer].views) for layer in self._layers], class_of=self._class_of,
            interprets=self.lane.gpu.name == "triton",
        )  # fmt: skip
        does_fork = accelerator.device.type != "cpu" if forks is None else forks
        self._enqueued = PlannedLayers(self.lane, self._store, self._planning, gates, forks=does_fork)
        self._deadline = Deadline(options.deadline_s)
        self._deadline_s = options.deadline_s
        self._posts: SharePosts | None = None
        self._service: ShareService | None = None
        self._wait: StreamWait | None = None
        self._done = accelerator.event()
        self._revision = self._seen_revision = -1
        self._slots = dict(self.lane.pool.layers)
        self._counting = threading.Lock()
        self.is_ahead = False
        """Whether the device's slots and scores are ahead of the coordinator's."""
        self.is_open = False
        """Whether a token is under way."""
        self.failure: str | None = None
        """Why it is not used any more."""
        self._lost: Exception | None = None
        """What enqueueing the token under way has failed with."""
        self.num_steps = 0
        self.num_layers = len(self._layers)

    def is_stale(self) -> bool:
        """Whether slots are others than those that it was made for."""
        revision = self._coordinator.revision
        if self._seen_revision == revision:
            return False
        layers = self.lane.pool.layers
        if any(layers.get(layer) is not slots for layer, slots in self._slots.items()):
            return True
        self._seen_revision = revision
        return False

    # A token.

    def begin_step(self) -> None:
        """Let the device have what the host knows, if that has planned meanwhile, and answer what is asked.

        StepLost where that fails, or the token before has failed and nobody has asked since.
        """
        self.abandon()
        if self.failure is not None:
            raise StepLost(f"the device's planner failed: {self.failure}")
        try:
            if self._coordinator.revision != self._revision:
                self._set_tables()
            if not self.is_ahead:
                self._settle_lane()
                self._planning.upload([self._coordinator.hand_over(layer) for layer in self._layers])
                self.is_ahead = True
            if self._service is not None:
                self._service.open()
        except DEVICE_ERRORS as error:
            self.lose(error)
        self.is_open = True
        self._shares.clear()
        self._enqueued.begin()

    def enqueue(
        self, layer: int, routed: Routed, scores: torch.Tensor | None, *, is_told: bool = False
    ) -> torch.Tensor:
        """Enqueue all of a layer's step of one token; returns where its answer will be, `[1, hidden]`.

        `routed` has its tensors in one piece each, ids int64 and weights float32; `scores` float32 `[num_experts]` are
        the router's probabilities, None where nobody has them; `is_told`: `steps` will be asked what was decided.
        StepLost where it cannot be; the planner is given up by `abandon`, which no capture is around.
        """
        try:
            if self._posts is None or self._wait is None:
                self._posts, self._wait = self._make_service(routed)
            if is_told:
                seen = self._seen.get(layer)
                if seen is None or not seen.takes(routed, scores):
                    seen = self._seen[layer] = Seen(routed, scores)
                seen.keep(routed, scores)
            return self._enqueued.enqueue(layer, routed, scores, self._posts, self._wait)
        except DEVICE_ERRORS as error:
            self._lost = error
            raise StepLost(f"the device's planner failed: {first_line(error)}") from error

    def lose(self, error: Exception, *, is_devices: bool = True) -> NoReturn:
        """Give the planner up because of what a token failed with; StepLost."""
        self._give_up(error, is_devices=is_devices)
        raise StepLost(f"the device's planner failed: {first_line(error)}") from error

    def join_streams(self) -> None:
        """Everything that was forked ends before what `compute` is given next: the token's last layer is enqueued."""
        self._enqueued.join_streams()

    def end_step(self) -> None:
        """Wait for the token's end; StepLost where something of it failed, and the planner is given up."""
        if not self.is_open:
            return
        accelerator, service = self.lane.accelerator, self._service
        failure: Exception | None = None
        is_devices = False
        accelerator.compute.record(self._done, "planned step")
        try:
            self._executor.wait(self._done, f"a token planned on {accelerator.name}")
        except DEVICE_ERRORS as error:
            failure, is_devices = error, True
            if isinstance(error, DeadlineError) and service is not None:
                service.release()
                with contextlib.suppress(*DEVICE_ERRORS):
                    self._executor.wait(self._done, f"a token released on {accelerator.name}")
                    is_devices = False
        if service is not None:
            service.close_step()
            share_failure = service.failure()
            failure, is_devices = share_failure or failure, is_devices and share_failure is None
        self.is_open = False
        self.num_steps += 1
        if failure is not None:
            self.lose(failure, is_devices=is_devices)
        for layer, (num_experts, began_s, ended_s) in self._shares.items():
            self._feedback(layer, num_experts, ended_s - began_s)

    def steps(self) -> list[PlannedStep]:
        """What the token that has ended last was given and what the device decided, by layer; waits for its copies."""
        planning, found = self._planning, []
        records, issued = (planning.tables.parts[name].tolist() for name in ("record", "issued"))
        specs = [spec for spec, _ in self._coordinator.layers()]
        for layer, seen in sorted(self._seen.items()):
            place = self._place[layer]
            _, *share_s = self._shares.get(layer, (0,))
            table = self._tables[self._class_of[place]]
            given = specs, place, table, records[place], issued[place], seen, self._enqueued.guesses(layer)
            found.append(planned_step(*given, (share_s[0], share_s[1]) if share_s else None))
        return found

    def abandon(self) -> None:
        """An error ended the token in the middle: let what is under way end. Not within a capture."""
        lost, self._lost = self._lost, None
        if lost is not None:
            self._give_up(lost)
        elif self.is_open:
            with contextlib.suppress(StepLost, *DEVICE_ERRORS):
                self.join_streams()
            with contextlib.suppress(StepLost):
                self.end_step()

    def give_back(self) -> None:
        """Let the host know what the device has made of slots and scores: it plans next."""
        self.abandon()
        if not self.is_ahead:
            return
        self.count()
        for layer, tables in zip(self._layers, self._planning.download(), strict=True):
            self._coordinator.take_back(layer, tables)
        self.is_ahead = False

    def count(self) -> None:
        """Add to the coordinator's counters what the device has counted since; in the middle of a token, from another
        thread, what it has counted so far.
        """
        if not self.is_ahead:
            return
        with self._counting:
            counted = self._planning.counted()
            for place, layer in enumerate(self._layers):
                counts = DeviceCounts(*(counted[name][place] for name in DeviceCounts._fields))
                self._coordinator.note_planned(layer, self._tables[self._class_of[place]], counts)

    def stop(self) -> None:
        """End the thread that answers."""
        if self._service is not None:
            self._service.stop()

    # What it is made of.

    def _set_tables(self) -> None:
        """Ask the scheduler anew: pace, overhead or the scheduler itself are others than they were."""
        if self.is_ahead:
            self.count()
        found = DeviceTables(self._coordinator.scheduler)
        self._tables = [
            found.of(cost, self._top_k)[0]
            for cost in {
                self._class_of[place]: cost for place, (_, cost) in enumerate(self._coordinator.layers())
            }.values()
        ]
        for number, table in enumerate(self._tables):
            self._planning.set_table(number, table.packed(), table.gains_ns())
        self._revision = self._coordinator.revision

    def _make_service(self, routed: Routed) -> tuple[SharePosts, StreamWait]:
        accelerator, cpu = self.lane.accelerator, self._executor.cpu
        posts = SharePosts(
            accelerator, self._layers, hidden=self._hidden, hidden_dtype=routed.hidden.dtype, top_k=self._top_k,
            answers_pairs=cpu.answers_pairs,
        )  # fmt: skip
        chosen = choose_wait(accelerator, posts, launch=word_wait(), deadline_s=self._deadline_s)
        if chosen.wait is None:
            raise KernelError(f"no way for a stream to wait for the host: {'; '.join(chosen.reasons)}")
        logger.debug("the device's planner waits for the CPU by %s", chosen.wait.name)
        self._service = ShareService(posts, cpu, self._deadline, partial(_note_share, self._shares))
        weakref.finalize(self, self._service.stop)
        if self.is_open:
            self._service.open()
        return posts, chosen.wait

    def _settle_lane(self) -> None:
        """Let every copy that the host has ordered land, and let it be seen."""
        queue = self.lane.queue
        for layer, slots in self.lane.pool.layers.items():
            for place in list(slots.unsettled):
                queue.settle(layer, place)
        self.lane.drain()

    def _give_up(self, error: Exception, *, is_devices: bool = True) -> None:
        """The host plans from now on; slots and scores are in doubt, the device as well if it `is_devices` failure."""
        if self.failure is not None:
            return
        self.failure, self.is_open, self.is_ahead = first_line(error), False, False
        logger.warning("the device's planner failed: %s; the host plans from now on", self.failure)
        service = self._service
        if service is not None:
            service.release()  # whatever the streams still wait for
        with contextlib.suppress(*DEVICE_ERRORS):
            self.join_streams()  # what copies into slots ends before these are filled again
        if is_devices:
            self._recovery.recover_lost(AcceleratorFailed(self.lane, error))
        else:
            self._recovery.refill(self.lane)
        if service is not None:
            service.close_step()
            if service.is_dead:
                self._executor.give_up_cpu()
            service.stop()


def _note_share(
    shares: dict[int, tuple[int, float, float]], layer: int, experts: tuple[int, ...], began_s: float, ended_s: float
) -> None:
    """In the thread that answers, which is not to keep the planner alive."""
    shares[layer] = len(experts), began_s, ended_s
