"""What measured steps teach: how fast the CPU really is, and whether hybrid plans pay at all."""

from __future__ import annotations

import math
from collections import deque
from statistics import median

__all__ = ["Fallback", "Overhead", "Pace"]


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


_WORTH_CORRECTING = 0.03
"""Of what a step is predicted to take; a window's own scatter is about as much."""


class Overhead:
    """Hears how much later steps end than predicted, whatever they compute; `more_s` is that, to be added.

    Calibration measures a step's overhead once, as what is left of other measurements: 0.3 ms more or less from run to
    run on two cores, for all methods alike.
    """

    def __init__(self, *, window: int = 64, first: int = 16) -> None:
        """Changes at most once in `window` observations, but for once after the `first` of all."""
        self.more_s = 0.0
        self._window, self._wanted = window, first
        self._steps: list[tuple[float, float]] = []

    def observe(self, predicted_s: float, measured_s: float) -> bool:
        """Take one step, predicted with the current `more_s`; True if that changed `more_s`."""
        self._steps.append((predicted_s, measured_s))
        if len(self._steps) < self._wanted:
            return False
        self._wanted = self._window
        found_s = median(measured_s - predicted_s for predicted_s, measured_s in self._steps)
        typical_s = median(predicted_s for predicted_s, _ in self._steps)
        self._steps.clear()
        if abs(found_s) < _WORTH_CORRECTING * typical_s:
            return False
        self.more_s += found_s
        return True


class Fallback:
    """Watches decode steps; `scheduler` is the one to use instead of the user's, None for the user's."""

    def __init__(self, *, first: int = 256, probe: int = 32, margin: float = 0.95, longest: int = 8192) -> None:
        """Counts are decode steps of single layers."""
        self.scheduler: str | None = None
        self.has_fallen = False
        self._probe, self._margin, self._longest = probe, margin, longest
        self._pause = self._left = first
        self._hybrid: deque[float] = deque(maxlen=probe)
        self._single: list[float] = []
        self._predicted = {"cpu_only": 0.0, "gpu_only": 0.0}
        self._wins = self._losses = 0

    @property
    def state(self) -> str:
        """In a word or two: hybrid, trying cpu_only or, once it has fallen, cpu_only; gpu_only likewise."""
        if self.scheduler is None:
            return "hybrid"
        return self.scheduler if self.has_fallen else f"trying {self.scheduler}"

    @property
    def wants_prediction(self) -> bool:
        """Whether this step's prediction would be heard: every eighth hybrid step, to keep it cheap."""
        return not self.has_fallen and self.scheduler is None and self._left % 8 == 0

    def predict(self, cpu_s: float, gpu_s: float) -> None:
        """Hear what each device alone would have taken for a step."""
        self._predicted["cpu_only"] += cpu_s
        self._predicted["gpu_only"] += gpu_s

    def observe(self, seconds: float) -> bool:
        """Take one decode step's time; True if that changed `scheduler`."""
        if self.has_fallen:
            return False
        if self.scheduler is None:
            self._hybrid.append(seconds)
            self._left -= 1
            if self._left > 0:
                return False
            order = sorted(self._predicted, key=self._predicted.__getitem__)
            self.scheduler = order[self._losses % 2]
            return True
        self._single.append(seconds)
        if len(self._single) < self._probe:
            return False
        self._judge()
        return True

    def _judge(self) -> None:
        is_faster = median(self._single) < self._margin * median(self._hybrid)
        self._wins = self._wins + 1 if is_faster else 0
        self._single = []
        if self._wins == 2:
            self.has_fallen = True
            return
        self.scheduler = None
        if is_faster:
            self._left = self._probe
            return
        self._losses += 1
        self._pause = min(self._pause * 2, self._longest)
        self._left = self._pause
        self._predicted = dict.fromkeys(self._predicted, 0.0)
