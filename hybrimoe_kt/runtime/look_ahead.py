"""What a layer step does for later ones while its own work is under way: it is learnt from, and prefetches start."""

from __future__ import annotations

import time
from collections.abc import Sequence

from hybrimoe_kt.core.coordinator import Coordinator
from hybrimoe_kt.core.types import Phase, Plan, Routing
from hybrimoe_kt.device.activity import ActivityLog
from hybrimoe_kt.device.executor import DEVICE_ERRORS, AcceleratorFailed, Executor
from hybrimoe_kt.device.readback import Guesses, Predict, Step, ask

from .recording import halved
from .recovery import Recovery
from .routing import predicted_routing

__all__ = ["LookAhead"]


class LookAhead:
    """Asks the gates of later layers, and starts the transfers that the coordinator chooses by their guesses."""

    def __init__(self, coordinator: Coordinator, executor: Executor, recovery: Recovery, prefetch_size: int) -> None:
        self._coordinator, self._executor, self._recovery = coordinator, executor, recovery
        self._size = prefetch_size
        self.gates: dict[int, Predict] = {}
        """Layer -> what predicts the routing of those after it."""

    def prefetch(
        self, plan: Plan, step: Step, phase: Phase | None, log: ActivityLog | None, *, is_recorded: bool
    ) -> None:
        """Learn from the open plan and start transfers for later layers; AcceleratorFailed where gates or links do."""
        coordinator, executor = self._coordinator, self._executor
        prefetches = self._size > 0 and executor.num_slots > 0
        if not prefetches and not is_recorded:
            coordinator.learn()
            return
        predictions: Sequence[Routing] = ()
        lane, predict = executor.lane_of.get(plan.layer), self.gates.get(plan.layer)
        if lane is not None and predict is not None:
            try:
                lane.readback.ask(step, predict)
            except DEVICE_ERRORS as error:
                raise AcceleratorFailed(lane, error) from error
            coordinator.learn()  # while the gates compute
            try:
                guesses = lane.readback.wait_guesses(step) if prefetches else None
            except DEVICE_ERRORS as error:
                raise AcceleratorFailed(lane, error) from error
            if guesses is not None:
                rows = halved(guesses.scores).tolist() if is_recorded else guesses.rows
                predictions = predicted_routing(guesses, rows, phase)
        if prefetches:
            began = time.perf_counter() if log is not None else 0.0
            orders = coordinator.prefetch(plan, predictions)
            if orders.dropped:
                executor.heed(orders.dropped, ())
            if orders.transfers:
                executor.prefetch(orders.transfers)
            if log is not None:
                log.chose(plan.layer, orders.transfers, began, time.perf_counter())

    def guesses(self, layer: int, step: Step) -> Guesses | None:
        """What the gates guessed in a step, for a recording; asked now where nobody prefetches, as a replay may."""
        lane, predict, guesses = self._executor.lane_of.get(layer), self.gates.get(layer), None
        if lane is not None:
            try:
                guesses = lane.readback.wait_guesses(step)
            except DEVICE_ERRORS as error:
                self._recovery.recover(AcceleratorFailed(lane, error))
        return ask(predict, step.routed.hidden, step.routed.ids) if guesses is None and predict is not None else guesses

    def needs_nothing(self, layer: int, num_tokens: int) -> bool:
        """Whether what `layer` is routed to makes no difference to what is prefetched."""
        predict = self.gates.get(layer) if self._size > 0 else None
        return predict is None or all(self._coordinator.decides_nothing(later, num_tokens) for later in predict.layers)
