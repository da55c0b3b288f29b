"""What happens when an accelerator fails: the cache stays true, the user is told once, the model goes on."""

from __future__ import annotations

import logging

import torch

from hybrimoe_kt.core.coordinator import Coordinator
from hybrimoe_kt.core.types import Plan
from hybrimoe_kt.device.executor import AcceleratorFailed, Executor
from hybrimoe_kt.device.lane import Lane
from hybrimoe_kt.errors import CapacityError, DeadlineError, KernelError, first_line

from .health import AcceleratorHealth

__all__ = ["Recovery"]

logger = logging.getLogger(__name__)

_SHARE_KEPT = 0.75
"""Of a layer's slots, when the accelerator runs out of memory."""


class Recovery:
    """Keeps coordinator and executor in agreement after failures."""

    def __init__(self, coordinator: Coordinator, executor: Executor) -> None:
        self._coordinator, self._executor = coordinator, executor
        self.health = {lane.accelerator.name: AcceleratorHealth() for lane in executor.lanes}
        """By accelerator, for as long as the model runs."""
        self._told: set[tuple[str, str, type[Exception]]] = set()

    def fill_slots(self) -> None:
        """Bring an expert into every free slot; again after a failure, as what is free has changed then."""
        while not self._fill_slots():
            pass

    def _fill_slots(self) -> bool:
        transfers = self._coordinator.initial_transfers()
        for number, transfer in enumerate(transfers):
            try:
                self._executor.fill(transfer)
            except AcceleratorFailed as failure:
                for missing in transfers[number:]:
                    self._coordinator.fail(missing)
                self.recover(failure)  # gives up after a few times, so this ends
                return False
        return True

    def recover(self, failure: AcceleratorFailed, plan: Plan | None = None) -> None:
        """Free every slot whose bytes are in doubt; shrink the cache or give the accelerator up if it comes to that.

        `plan` is the (finished) plan that failed, if any. Where another accelerator serves its layer, what that one
        has been given of the step ends first: the step's tensors are free once it has been computed anew.
        """
        lane, cause = failure.lane, failure.cause
        own = self._executor.lane_of.get(plan.layer) if plan is not None else None
        if own is not None and own is not lane:
            self._settle(own, plan)
        is_drained = self._drain(lane)
        self._drop_doubtful(lane, plan)
        health = self.health[lane.accelerator.name]
        health.failed_steps += 1
        health.last_failure = first_line(cause)
        keeps_failing = lane.note_failure()
        if not is_drained or isinstance(cause, DeadlineError) or keeps_failing:
            self._give_up(lane, failure, keep=not is_drained)
        elif isinstance(cause, (torch.OutOfMemoryError, CapacityError)) and lane.pool.num_slots:
            self._shrink(lane, failure)
        else:
            self._tell(failure, "this step is computed on the CPU")

    def recover_lost(self, failure: AcceleratorFailed) -> None:
        """As `recover`, where the host had gone on: plans have been finished since, whatever became of their copies.

        So every slot is in doubt, and is filled again. Call it with no plan open.
        """
        self.recover(failure)
        self.refill(failure.lane)

    def refill(self, lane: Lane) -> None:
        """Doubt every slot of an accelerator, and fill it again. Call it with no plan open."""
        for layer, slots in lane.pool.layers.items():
            for slot in range(len(slots.views)):
                self._coordinator.drop(layer, slot)
        self.fill_slots()

    def make_room(self, lane: Lane, cause: Exception) -> bool:
        """Shrink an accelerator's cache because something else on its device lacks memory; False if nothing is left."""
        if lane not in self._executor.lanes or not lane.pool.num_slots:
            return False
        failure = AcceleratorFailed(lane, cause)
        if not self._drain(lane):
            self._give_up(lane, failure, keep=True)
            return False
        self._drop_doubtful(lane, None)
        self.health[lane.accelerator.name].last_failure = first_line(cause)
        self._shrink(lane, failure)
        return True

    def abandon(self, plan: Plan | None) -> None:
        """After an error of the CPU or the host: let what was submitted end, doubt what this plan, if any, touched."""
        try:
            self._executor.settle_cpu()
        except KernelError:
            logger.debug("the CPU share of an abandoned step failed too", exc_info=True)
        lane = self._executor.lane_of.get(plan.layer) if plan is not None else None
        if lane is not None:
            self._drain(lane)
            self._drop_doubtful(lane, plan)

    def _settle(self, lane: Lane, plan: Plan | None) -> None:
        """Let an accelerator end what a plan gave it, though another failed."""
        is_drained = self._drain(lane)
        self._drop_doubtful(lane, plan)
        if not is_drained:
            self._give_up(lane, AcceleratorFailed(lane, DeadlineError("it does not come to an end")), keep=True)

    @staticmethod
    def _drain(lane: Lane) -> bool:
        try:
            lane.drain()
        except DeadlineError:
            return False
        return True

    def _drop_doubtful(self, lane: Lane, plan: Plan | None) -> None:
        doubtful = lane.doubtful_slots()
        if plan is not None and plan.layer in lane.pool.layers:
            doubtful |= {(plan.layer, slot) for slot in plan.slots.values()}
        for layer, slot in sorted(doubtful):
            self._coordinator.drop(layer, slot)

    def _shrink(self, lane: Lane, failure: AcceleratorFailed) -> None:
        """All memory is given back before any is taken again: what is left is then one piece."""
        sizes = {layer: int(len(slots.memory) * _SHARE_KEPT) for layer, slots in lane.pool.layers.items()}
        try:
            for layer in sizes:
                self._coordinator.resize(layer, 0)
                lane.resize(layer, 0)
            for layer, num_slots in sizes.items():
                lane.resize(layer, num_slots)
                self._coordinator.resize(layer, num_slots)
            self._executor.count_slots()
        except (KernelError, CapacityError, RuntimeError) as error:
            self._give_up(lane, AcceleratorFailed(lane, error), keep=False)
            return
        self.health[lane.accelerator.name].shrunk += 1
        self._tell(failure, f"the expert cache shrinks to {lane.pool.num_slots} slots")

    def _give_up(self, lane: Lane, failure: AcceleratorFailed, *, keep: bool) -> None:
        for layer in lane.layers:
            self._coordinator.resize(layer, 0)
        self._executor.remove(lane, keep=keep)
        self.health[lane.accelerator.name].given_up = True
        self._tell(failure, "it is not used any more, its experts run on the CPU")

    def _tell(self, failure: AcceleratorFailed, consequence: str) -> None:
        key = failure.lane.accelerator.name, consequence, type(failure.cause)
        if key not in self._told:
            self._told.add(key)
            logger.warning("%s failed: %s; %s", failure.lane.accelerator.name, first_line(failure.cause), consequence)
