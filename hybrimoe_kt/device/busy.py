"""How busy CPU, accelerators and links are while a model runs, as measured: now and then one pass is watched.

The CPU's share counts from its submission to when the host saw it done; work given to a stream is stamped there before
and after, as for timelines. An accelerator's experts are counted, not what the model computes there beside them. What
a pass has started counts for it as a whole, also where it ends later: what was under way when it began does not.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from hybrimoe_kt.core.intervals import Spans, length, union
from hybrimoe_kt.core.types import Transfer

from .accelerator import Stamp
from .executor import DEVICE_ERRORS, Executor

__all__ = ["BusyMeter"]

_EVERY, _FIRST = 64, 8
"""Passes from one that is watched to the next, and before the first. Choices: watching took 24 to 38 us a layer with
the emulator on two cores, 6 us on the CPU alone, and first passes are not like others."""
_KEPT = 32
"""Passes that shares are of, the latest; half an hour's at a token a second, a minute's at 30."""
_MOST_WAITING = 4
"""Watched passes whose stamps may be waited for: a stream that has stopped is not asked for ever."""


class _Stamped(NamedTuple):
    resource: str
    lane: int
    before: Stamp
    after: Stamp


@dataclass(slots=True, eq=False)
class _Pass:
    began_s: float
    began_host_s: float
    wall_s: float = 0.0
    busy_s: dict[str, float] = field(default_factory=lambda: {"cpu": 0.0})
    stamped: list[_Stamped] = field(default_factory=list)
    timed: frozenset[int] = frozenset()
    """Accelerators, by number, whose stamps tell when work was done."""


class BusyMeter:
    """Watches a runtime's executor, unless somebody else writes down what it does."""

    is_open = True
    plan_number = 0

    def __init__(self, executor: Executor, layers: Sequence[int], *, every: int = _EVERY, first: int = _FIRST) -> None:
        """A pass goes from the first of `layers` to the last; the first `first` are passed over."""
        self.first_layer, self.last_layer = min(layers), max(layers)
        self._executor, self._every, self._until = executor, every, first
        self._pass: _Pass | None = None
        self._waiting: list[_Pass] = []
        self._measured: deque[_Pass] = deque(maxlen=_KEPT)

    def begin(self) -> None:
        """The first layer's step is about to begin."""
        if self._pass is not None:  # never came to its end
            self._leave()
        if self._waiting:
            self._settle()
        self._until -= 1
        if self._until >= 0 or self._executor.log is not None:
            return
        self._until = self._every - 1
        self._executor.log_to(self)
        lanes = enumerate(self._executor.lanes)
        timed = frozenset(number for number, lane in lanes if lane.accelerator.has_times)
        self._pass = _Pass(time.perf_counter(), time.thread_time(), timed=timed)

    def end(self) -> None:
        """The last layer's answer is there, or on its way."""
        watched = self._pass
        if watched is None or self._executor.log is not self:
            self._pass = None
            return
        self._leave()
        watched.wall_s = time.perf_counter() - watched.began_s
        if self._executor.lanes:  # with none, experts are computed by the same thread
            watched.busy_s["host"] = min(watched.wall_s, time.thread_time() - watched.began_host_s)
        self._waiting.append(watched)
        del self._waiting[:-_MOST_WAITING]

    def _leave(self) -> None:
        self._pass = None
        if self._executor.log is self:
            self._executor.log_to(None)

    def shares(self) -> dict[str, float]:
        """Share of the watched passes' time that each resource was busy, 0 to 1; from any thread.

        The mean of several accelerators; nothing of what has not been measured, or cannot be.
        """
        passes = list(self._measured)
        wall_s = sum(each.wall_s for each in passes)
        names = dict.fromkeys(name for each in passes for name in each.busy_s)
        return {name: min(1.0, sum(each.busy_s.get(name, 0.0) for each in passes) / wall_s) for name in names}

    def _settle(self) -> None:
        for watched in list(self._waiting):
            try:
                spans = _spans(watched)
            except DEVICE_ERRORS:  # which whoever gives it work hears of as well
                self._waiting.remove(watched)
                continue
            if spans is None:
                continue
            self._waiting.remove(watched)
            if watched.timed:
                watched.busy_s |= {"gpu": 0.0, "link": 0.0}
            for (resource, _), found in spans.items():
                watched.busy_s[resource] += length(union(found)) / len(watched.timed)
            watched.stamped.clear()
            self._measured.append(watched)

    # What the executor and its lanes tell.

    def computed(self, layer: int, experts: tuple[int, ...], began_s: float, ended_s: float) -> None:
        """The CPU's share of a plan is done."""
        if self._pass is not None:
            self._pass.busy_s["cpu"] += ended_s - began_s

    def launched(self, lane: int, layer: int, experts: tuple[int, ...], before: Stamp, after: Stamp) -> None:
        """Experts were given to an accelerator."""
        self._stamped("gpu", lane, before, after)

    def sent(
        self, lane: int, transfer: Transfer, plan: int, piece: int, pieces: int, before: Stamp, after: Stamp
    ) -> None:
        """A piece of an expert was given to a link."""
        self._stamped("link", lane, before, after)

    def _stamped(self, resource: str, lane: int, before: Stamp, after: Stamp) -> None:
        if self._pass is not None and lane in self._pass.timed:
            self._pass.stamped.append(_Stamped(resource, lane, before, after))


def _spans(watched: _Pass) -> dict[tuple[str, int], Spans] | None:
    """By resource and lane, when it worked; None while some of it is not over."""
    spans: dict[tuple[str, int], Spans] = {}
    for resource, lane, before, after in watched.stamped:
        began_s, ended_s = before.at_s(), after.at_s()
        if began_s is None or ended_s is None:
            return None
        spans.setdefault((resource, lane), []).append((began_s, max(began_s, ended_s)))
    return spans
