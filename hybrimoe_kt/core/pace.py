"""How fast the CPU's experts really are, beside what the profile says: other programs, heat and sleep change it.

A profile is measured once, alone. In service the CPU's share of every step is timed anyway, so its cost follows:
medians of a window, on a coarse grid, so that a plan remembered for a cost stays good for a while.

Pure: seconds are handed in, nothing is measured here.
"""

from __future__ import annotations

import math
from statistics import median

__all__ = ["Pace"]

_GRID = 1.05
"""Paces are powers of it: finer than the 10 % that a prediction may be off."""


class Pace:
    """Hears what the CPU took beside what was predicted; `cpu` is the factor on the profile's seconds."""

    def __init__(self, *, window: int = 64, limit: float = 4.0) -> None:
        """Changes at most once in `window` CPU shares, and never beyond `limit` or its inverse."""
        self.cpu = 1.0
        self._window, self._limit = window, limit
        self._ratios: list[float] = []

    def observe(self, predicted_s: float, measured_s: float, *, is_bound: bool = False) -> bool:
        """Take one CPU share, predicted at the current `cpu`; True if that changed `cpu`.

        `is_bound`: it had ended by then, nobody knows when; heard only where it was quicker than predicted.
        """
        if predicted_s <= 0.0:  # a profile whose CPU costs nothing has no pace
            return False
        ratio = measured_s / predicted_s
        if is_bound and ratio > 1.0:
            return False
        self._ratios.append(ratio)
        if len(self._ratios) < self._window:
            return False
        found = min(max(self.cpu * median(self._ratios), 1.0 / self._limit), self._limit)
        self._ratios.clear()
        if abs(math.log(found / self.cpu, _GRID)) < 1.0:  # a window's own scatter, 2 to 3 %
            return False
        before, self.cpu = self.cpu, _GRID ** round(math.log(found, _GRID))
        return self.cpu != before
