"""Waiting on the host: never without an end, and without burning the cores that do the work."""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections.abc import Callable

from hybrimoe_kt.errors import DeadlineError

__all__ = ["SHARE_SLEPT", "SPIN_S", "BackOff", "Deadline"]

SHARE_SLEPT = 0.7
"""Of a wait whose length is known about, before polling: every poll takes a core from somebody on a small machine."""

SPIN_S = 200e-6
"""How long polling goes on without sleep where a core is to spare: the shortest sleep takes 25 us, as measured on two
cores of an EPYC, and most waits of a step end sooner than this."""
_POLLS_WITHOUT_SLEEP = 8
_SHARE_OF_ELAPSED = 0.02
_SHORTEST_SLEEP_S, _LONGEST_SLEEP_S = 10e-6, 1e-3
_WORTH_RESTING_S = 2e-4
_PR_SET_TIMERSLACK = 29
_sharpened = threading.local()


class Deadline:
    """How long anything may take before it counts as dead."""

    def __init__(self, deadline_s: float, spin_s: float = 0.0) -> None:
        """Waits end within `spin_s` without a sleep between polls; 0 where every core has work to do."""
        self.deadline_s, self._spin_s = deadline_s, spin_s

    def wait(
        self,
        is_done: Callable[[], bool],
        what: str,
        meanwhile: Callable[[], object] | None = None,
        rest_s: float = 0.0,
    ) -> None:
        """Return once `is_done()`; DeadlineError naming `what` after the deadline. `meanwhile` runs between polls.

        Sleeps 2 % of the time waited so far between polls, so a wait is late by that at most; in the first `rest_s`
        seconds, when it is not expected to end, a quarter of those at a time.
        """
        if is_done():
            return
        _sharpen_sleep()
        began = time.perf_counter()
        rest_s = min(rest_s, self.deadline_s / 10)
        polls = 0
        while True:
            if meanwhile is not None:
                meanwhile()
            if is_done():
                return
            waited = time.perf_counter() - began
            if waited > self.deadline_s:
                raise DeadlineError(f"{what} did not end within {self.deadline_s:g} s")
            polls += 1
            if waited < rest_s and rest_s > _WORTH_RESTING_S:
                time.sleep(min(rest_s / 4, rest_s - waited))
            elif polls > _POLLS_WITHOUT_SLEEP and waited > rest_s + self._spin_s:
                time.sleep(min(max(waited * _SHARE_OF_ELAPSED, _SHORTEST_SLEEP_S), _LONGEST_SLEEP_S))


class BackOff:
    """Between polls for what may come at any time: without sleep at first, then 2 % of the time since the last came.

    Each pause lets other threads have the interpreter's lock, which one that only polls would keep for 5 ms.
    """

    def __init__(self, spin_s: float = 0.0, longest_s: float = _LONGEST_SLEEP_S) -> None:
        """No sleep within `spin_s`; 0 where every core has work to do. To be used by the thread that makes it."""
        self._spin_s, self._longest_s = spin_s, longest_s
        _sharpen_sleep()
        self.reset()

    def reset(self) -> None:
        """Something has come: begin anew."""
        self._began = time.perf_counter()

    def pause(self) -> None:
        waited = time.perf_counter() - self._began
        if waited > self._spin_s:
            time.sleep(min(max(waited * _SHARE_OF_ELAPSED, _SHORTEST_SLEEP_S), self._longest_s))
        else:
            time.sleep(0)


def _sharpen_sleep() -> None:
    """Ask Linux to wake this thread within a microsecond of the time asked for; by default it may take 50 more."""
    if getattr(_sharpened, "done", False):
        return
    _sharpened.done = True
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(1000), 0, 0, 0)
