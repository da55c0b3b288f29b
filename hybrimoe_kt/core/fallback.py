"""Whether hybrid plans pay on this machine: now and then one device is tried alone, and kept if it is faster.

Plans are predicted from measurements that were made one at a time; under contention a hybrid can lose to the better
of its halves (published reports: 8 to 40 times). So after `first` decode steps of a layer the device that the cost
model thinks the better alternative gets `probe` steps. If their median is below `margin` times the hybrid's, twice in
a row with hybrid steps between, it stays. Otherwise the next trial comes after twice as many steps.

Pure: seconds are handed in, nothing is measured here.
"""

from __future__ import annotations

from collections import deque
from statistics import median

__all__ = ["Fallback"]


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
