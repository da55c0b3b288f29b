"""Writes down what CPU, accelerators and links really do while a model runs; nothing is kept unless asked for.

Times are seconds of `time.perf_counter`. The CPU's share counts from its submission to when the host saw it done. Work
given to a stream is stamped there before and after, see `Accelerator.stamp`: on hardware by events of the device, which
are read once they have been reached. A copy's stamp before it tells when its own stream was ready, which may be before
the link was: copies on one link are shown one after the other, as they pass it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from hybrimoe_kt.core.timeline import Kind, Span, Timeline, experts_label, plan_details
from hybrimoe_kt.core.types import Plan, Routing, Transfer

from .accelerator import Stamp

__all__ = ["ActivityLog", "Watcher"]


_FULL = 0.9
"""Share of a timeline's capacity after which nothing new is begun."""


class Watcher(Protocol):
    """What is told of work on CPU, accelerators and links; `ActivityLog` writes it down."""

    is_open: bool
    """Whether it wants to know what streams are given."""

    @property
    def plan_number(self) -> int:
        """What copies that are decided now are told with."""

    def computed(self, layer: int, experts: tuple[int, ...], began_s: float, ended_s: float) -> None:
        """The CPU's share of the plan is done."""

    def launched(self, lane: int, layer: int, experts: tuple[int, ...], before: Stamp, after: Stamp) -> None:
        """Experts were given to an accelerator."""

    def sent(
        self, lane: int, transfer: Transfer, plan: int, piece: int, pieces: int, before: Stamp, after: Stamp
    ) -> None:
        """A piece of an expert, `piece` of `pieces` counted from 1, was given to a link; `plan` decided it."""


class _Pending(NamedTuple):
    """Work on a stream whose times may not be known yet."""

    span: Span
    before: Stamp
    after: Stamp


class ActivityLog:
    """One run's timeline in the making; used by the runtime, its executor, lanes and queues."""

    def __init__(self, timeline: Timeline, first_layer: int) -> None:
        """A step begins whenever `first_layer` reports again."""
        self.timeline, self._first_layer = timeline, first_layer
        timeline.info |= {
            "origin": "a run, on the host's clock",
            "scheduler": "host clock",
            "CPU": "host clock, from submission to when the host saw it done",
        }
        self._pending: deque[_Pending] = deque()
        self._num_steps = self._num_plans = 0
        self._step: tuple[float, Routing] | None = None
        self._last_s = 0.0
        self.is_open = True
        """Whether there is room for another plan's work; looked at between plans, so that none is cut in two."""

    @property
    def plan_number(self) -> int:
        """The number of the plan at hand, counted from 1."""
        return self._num_plans

    def planned(self, plan: Plan, routing: Routing, began_s: float, ended_s: float) -> None:
        """A plan was made; everything until the next one belongs to it, but for prefetches."""
        self._settle()
        is_first = plan.layer == self._first_layer
        if is_first:
            self._end_step()
        if len(self.timeline.spans) + len(self._pending) > _FULL * self.timeline.capacity:
            self.is_open = False
            self.timeline.num_dropped += 1
            return
        self._num_plans += 1
        if is_first:
            self._step = began_s, routing
        details = plan_details(self._num_plans, plan)
        self._add("scheduler", 0, began_s, ended_s, f"L{plan.layer} plan", "plan", plan.layer, (), details)

    def replayed(self, layer: int, began_s: float, ended_s: float) -> None:
        """The host has enqueued a captured piece; `layer` is the one whose experts follow, -1 for none."""
        if self.is_open:
            label = f"L{layer} replay" if layer >= 0 else "replay"
            self._add("scheduler", 0, began_s, ended_s, label, "replay", layer, (), {"plan": self._num_plans + 1})

    def waited(self, layer: int, began_s: float, ended_s: float) -> None:
        """The host has read what the layer's router chose, for most of that time waiting for it."""
        if self.is_open:
            self._add(
                "scheduler",
                0,
                began_s,
                ended_s,
                f"L{layer} read",
                "wait for routing",
                layer,
                (),
                {"plan": self._num_plans + 1},
            )

    def chose(self, layer: int, transfers: Sequence[Transfer], began_s: float, ended_s: float) -> None:
        """Prefetches were decided while the plan's experts ran."""
        if not self.is_open:
            return
        chosen = [list(transfer.expert) for transfer in transfers]
        details = {"plan": self._num_plans, "prefetches": chosen}
        self._add("scheduler", 0, began_s, ended_s, f"L{layer} prefetch", "choose prefetches", layer, (), details)

    def computed(self, layer: int, experts: tuple[int, ...], began_s: float, ended_s: float) -> None:
        """The CPU's share of the plan is done."""
        if not self.is_open:
            return
        label = experts_label(layer, experts)
        self._add("cpu", 0, began_s, ended_s, label, "experts", layer, experts, {"plan": self._num_plans})

    def finished(self, ended_s: float) -> None:
        """A layer's answer is there."""
        self._last_s = ended_s

    def launched(self, lane: int, layer: int, experts: tuple[int, ...], before: Stamp, after: Stamp) -> None:
        """Experts were given to an accelerator."""
        label = experts_label(layer, experts)
        self._wait("gpu", lane, label, "experts", layer, experts, {"plan": self._num_plans}, before, after)

    def sent(
        self, lane: int, transfer: Transfer, plan: int, piece: int, pieces: int, before: Stamp, after: Stamp
    ) -> None:
        """A piece of an expert, `piece` of `pieces` counted from 1, was given to a link; `plan` decided it."""
        layer, expert = transfer.expert
        label = f"{experts_label(layer, (expert,))} {transfer.kind}"
        details = {"plan": plan, "slot": transfer.slot, "piece": piece, "pieces": pieces}
        self._wait("link", lane, label, transfer.kind, layer, (expert,), details, before, after)

    def close(self) -> Timeline:
        """Return the finished timeline; what has not ended by now is left out. Call it when nothing is under way."""
        self._settle()
        self._pending.clear()
        self._end_step()
        self.timeline.spans = _one_after_the_other(self.timeline.spans)
        return self.timeline

    def _end_step(self) -> None:
        if self._step is not None:
            began_s, routing = self._step
            tokens, work = routing.num_tokens, "decode" if routing.is_decode else "prefill"
            details = {"step": self._num_steps, "tokens": tokens}
            ended_s = max(began_s, self._last_s)
            self._add("step", 0, began_s, ended_s, f"{work} {tokens}", work, -1, (), details)
            self._num_steps += 1
        self._step = None

    def _add(
        self, kind: Kind, lane: int, began_s: float, ended_s: float, label: str, work: str, layer: int,
        experts: tuple[int, ...], details: dict[str, Any],
    ) -> None:  # fmt: skip
        self.timeline.add(Span(kind, lane, began_s, ended_s, label, work, layer, experts, details))

    def _wait(
        self, kind: Kind, lane: int, label: str, work: str, layer: int, experts: tuple[int, ...],
        details: dict[str, Any], before: Stamp, after: Stamp,
    ) -> None:  # fmt: skip
        span = Span(kind, lane, 0.0, 0.0, label, work, layer, experts, details)
        self._pending.append(_Pending(span, before, after))

    def _settle(self) -> None:
        """Read the times of what has ended; streams end their work in different orders."""
        for _ in range(len(self._pending)):
            pending = self._pending.popleft()
            began_s, ended_s = pending.before.at_s(), pending.after.at_s()
            if began_s is None or ended_s is None:
                self._pending.append(pending)
            else:
                self.timeline.add(pending.span._replace(start_s=began_s, end_s=max(began_s, ended_s)))


def _one_after_the_other(spans: Sequence[Span]) -> list[Span]:
    """Let no span begin before the one in front of it, on the same lane, has ended."""
    free_s: dict[str, float] = {}
    result = []
    for span in sorted(spans, key=lambda span: (span.end_s, span.start_s)):
        start_s = max(span.start_s, free_s.get(span.lane_name, span.start_s)) if span.kind != "step" else span.start_s
        free_s[span.lane_name] = span.end_s
        result.append(span if start_s == span.start_s else span._replace(start_s=start_s))
    return result
