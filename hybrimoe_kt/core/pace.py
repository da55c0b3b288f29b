"""How long something really takes, beside what the profile says: other programs, heat and sleep change it.

A profile is measured once, alone, and some of it is guessed. In service the CPU's share of every step is timed anyway,
and so is what lies between two layers, so their costs follow: medians of a window, on a coarse grid, so that a plan
remembered for a cost stays good for a while.

Pure: seconds are handed in, nothing is measured here.
"""

from __future__ import annotations

import math
from statistics import median

__all__ = ["Pace"]

_GRID = 1.05
"""Paces are powers of it: finer than the 10 % that a prediction may be off."""


class Pace:
    """Hears what was measured beside what was predicted; `factor` is that on the profile's seconds."""

    def __init__(self, *, window: int = 64, limit: float = 4.0) -> None:
        """Changes at most once in `window` observations, and never beyond `limit` or its inverse."""
        self.factor = 1.0
        self._window, self._limit = window, limit
        self._ratios: list[float] = []

    def observe(self, predicted_s: float, measured_s: float, *, is_bound: bool = False) -> bool:
        """Take one piece of work, predicted at the current `factor`; True if that changed `factor`.

        `is_bound`: it had ended by then, nobody knows when; heard only where it was quicker than predicted.
        """
        if predicted_s <= 0.0:  # what costs nothing in a profile has no pace
            return False
        ratio = measured_s / predicted_s
        if is_bound and ratio > 1.0:
            return False
        self._ratios.append(ratio)
        if len(self._ratios) < self._window:
            return False
        found = min(max(self.factor * median(self._ratios), 1.0 / self._limit), self._limit)
        self._ratios.clear()
        if abs(math.log(found / self.factor, _GRID)) < 1.0:  # a window's own scatter, 2 to 3 %
            return False
        before, self.factor = self.factor, _GRID ** round(math.log(found, _GRID))
        return self.factor != before
