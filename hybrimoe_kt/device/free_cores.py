"""How many cores other programs leave free, so that no thread of ours waits at a barrier for one that cannot run.

ggml's threads meet after every operation, and those that arrive first spin. With both of two cores busy otherwise, two
threads took five times as long as on a quiet machine.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

__all__ = ["FreeCores"]

_EVERY_S = 0.25
"""Between two looks: the kernel counts in steps of 10 ms, and a look takes some 50 us."""
_SOFTENED = 0.5
"""Share of what was found before that is kept, so that one busy moment of somebody else changes nothing."""


class FreeCores:
    """Watches what all programs take of the cores this process may run on, and what this one does itself."""

    def __init__(
        self,
        busy_s: Callable[[], float | None] | None = None,
        own_s: Callable[[], float] = time.process_time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`busy_s` and `own_s` tell how many seconds cores have worked so far, for all and for this process.

        Where the first is None nothing is known, and no core counts as taken.
        """
        self._cores = _allowed()
        self._busy_s, self._own_s, self._clock = busy_s or (lambda: _busy_s(self._cores)), own_s, clock
        self._next_s = 0.0
        self._before: tuple[float, float, float] | None = None
        self.others = 0.0
        """Cores that other programs keep busy, an average of the last second or so."""

    def of(self, num_threads: int) -> int:
        """How many of `num_threads` find a core of their own, at least one."""
        if num_threads == 1:
            return 1
        now = self._clock()
        if now >= self._next_s:
            self._next_s = now + _EVERY_S
            self._look(now)
        free = len(self._cores) - self.others
        return max(1, min(num_threads, round(free)))

    def _look(self, now: float) -> None:
        busy = self._busy_s()
        if busy is None:
            self._next_s, self.others = float("inf"), 0.0
            return
        own, before = self._own_s(), self._before
        self._before = now, busy, own
        if before is None:
            return
        elapsed = now - before[0]
        if elapsed > 8 * _EVERY_S:
            return  # nothing was computed for a while; what happened meanwhile is no guide
        others = max(0.0, (busy - before[1]) - (own - before[2])) / elapsed
        self.others = _SOFTENED * self.others + (1 - _SOFTENED) * others


def _allowed() -> tuple[int, ...]:
    """The cores, by the kernel's numbers, that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def _busy_s(cores: tuple[int, ...]) -> float | None:
    """Seconds these cores have worked since the start, or were taken by the machine's host; None where unknown."""
    wanted = {f"cpu{core}" for core in cores}
    try:
        with open("/proc/stat", encoding="ascii") as lines:
            found = [line.split() for line in lines if line.startswith("cpu")]
        ticks = os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):
        return None
    # user, nice, system, [idle, iowait], irq, softirq, steal
    return sum(sum(map(int, (*line[1:4], *line[6:9]))) for line in found if line[0] in wanted) / ticks
