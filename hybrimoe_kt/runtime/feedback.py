"""What decode steps teach in service: how fast CPU and model really are, and whether hybrid plans pay at all."""

from __future__ import annotations

import logging
import time

from hybrimoe_kt.config import ExpertOptions
from hybrimoe_kt.core.coordinator import Coordinator
from hybrimoe_kt.core.feedback import Fallback, Overhead, Pace
from hybrimoe_kt.core.types import Plan
from hybrimoe_kt.device.executor import Executor

__all__ = ["Feedback"]

logger = logging.getLogger(__name__)

_DENSE_LIMIT = 16.0
"""The profile's time between layers is a guess (`device.calibrate`), so it may be further off than the CPU's."""


class Feedback:
    """Hands what steps took to `Pace` and `Fallback`, and does what they say."""

    def __init__(self, options: ExpertOptions, coordinator: Coordinator, executor: Executor) -> None:
        self._coordinator, self._executor = coordinator, executor
        self._fallback = Fallback() if options.fallback else None
        self._pace = Pace() if options.follow_pace else None
        self._dense_pace = Pace(limit=_DENSE_LIMIT) if options.follow_pace else None
        self._overhead = Overhead() if options.follow_pace else None
        self._last_read_s = self._last_ended_s = 0.0

    @property
    def fallback_state(self) -> str:
        """As `Health.fallback` has it."""
        return "off" if self._fallback is None else self._fallback.state

    def step(self, plan: Plan, read_s: float, *, learns: bool) -> None:
        """Take a step that has been joined, whose routing was read at `read_s` of the clock.

        Not everything `learns`: prompts cost otherwise, and a recording's decisions follow from its routing alone.
        """
        since_s, self._last_read_s = read_s - self._last_read_s, read_s
        ended_s, self._last_ended_s = self._last_ended_s, time.perf_counter()
        if not learns:
            return
        if self._dense_pace is not None and ended_s:
            predicted_s = self._coordinator.between_layers_s(plan.layer)
            if self._dense_pace.observe(predicted_s, read_s - ended_s):
                self._predict_anew()
        if self._overhead is not None and self._overhead.observe(plan.makespan_s, self._last_ended_s - read_s):
            self._predict_anew()
        if self._fallback is not None and not self._fallback.has_fallen:
            self._compare(self._fallback, plan, since_s)
        if self._pace is not None and plan.cpu:
            self._follow(self._pace, plan)

    def share(self, layer: int, num_experts: int, seconds: float) -> None:
        """Take a share of one token that the CPU has computed for a device that plans."""
        if self._pace is not None and self._pace.observe(self._coordinator.cpu_share_s(layer, num_experts), seconds):
            self._predict_anew()

    def _follow(self, pace: Pace, plan: Plan) -> None:
        """Correct the predictions by what the CPU's share of the step took."""
        executor = self._executor
        is_bound = not executor.cpu_was_waited_for
        if pace.observe(plan.cpu_s, executor.cpu_share_s, is_bound=is_bound):
            self._predict_anew()

    def _predict_anew(self) -> None:
        assert self._pace is not None and self._dense_pace is not None, "options.follow_pace"
        assert self._overhead is not None, "so"
        cpu, dense, more_s = self._pace.factor, self._dense_pace.factor, self._overhead.more_s
        self._coordinator.set_pace(cpu, dense, more_s)
        logger.debug(
            "CPU experts take %.2f, what lies between layers %.2f times what the profile says, every step %.0f us more",
            cpu, dense, more_s * 1e6,
        )  # fmt: skip

    def _compare(self, fallback: Fallback, plan: Plan, seconds: float) -> None:
        """Tell the fallback what a step took, from one routing read to the next; obey it."""
        if fallback.wants_prediction:
            fallback.predict(*self._coordinator.single_device_s(plan))
        if fallback.observe(seconds):
            self._coordinator.use(fallback.scheduler)
        if fallback.has_fallen:
            logger.warning(
                "hybrid plans measured slower than %s on this machine, which is used from now on; --fallback off "
                "keeps hybrid plans, `hybrimoe calibrate` may make them better",
                "the CPU alone" if fallback.scheduler == "cpu_only" else "the accelerator alone",
            )
