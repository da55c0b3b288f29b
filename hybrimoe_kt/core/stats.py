"""Counters of what was decided; predicted seconds, never measured ones."""

from __future__ import annotations

_COUNTERS = (
    "cpu_busy_s",
    "elapsed_s",
    "experts_on_cpu",
    "experts_on_gpu",
    "gpu_busy_s",
    "hits",
    "link_busy_s",
    "makespan_s",
    "misses",
    "num_aborted",
    "num_failed",
    "num_plans",
    "num_prefetches",
    "num_streamed",
    "num_transfers",
    "pending",
    "predicted",
    "predicted_right",
    "predicted_routed",
    "prefetched_bytes",
    "transferred_bytes",
    "useful_prefetches",
    "wasted_bytes",
    "wasted_prefetches",
)


class Stats:
    """Plain counters the coordinator adds to. `*_busy_s` are predicted seconds of each resource."""

    __slots__ = _COUNTERS

    def __init__(self) -> None:
        for name in _COUNTERS:
            setattr(self, name, 0.0 if name.endswith("_s") else 0)

    num_plans: int
    hits: int
    pending: int
    misses: int
    experts_on_cpu: int
    experts_on_gpu: int
    num_transfers: int
    transferred_bytes: int
    num_prefetches: int
    num_streamed: int
    prefetched_bytes: int
    useful_prefetches: int
    wasted_prefetches: int
    wasted_bytes: int
    predicted: int
    predicted_right: int
    predicted_routed: int
    num_aborted: int
    num_failed: int
    cpu_busy_s: float
    gpu_busy_s: float
    link_busy_s: float
    makespan_s: float
    elapsed_s: float

    @property
    def hit_rate(self) -> float:
        """Share of routed experts that were in a slot and ready when their plan was made; 0 before the first plan."""
        routed = self.hits + self.pending + self.misses
        return self.hits / routed if routed else 0.0

    @property
    def precision(self) -> float:
        """Share of the experts predicted for a next layer that it routed to; 0 before the first prediction."""
        return self.predicted_right / self.predicted if self.predicted else 0.0

    @property
    def recall(self) -> float:
        """Share of the experts routed to, in layers with a prediction, that had been predicted."""
        return self.predicted_right / self.predicted_routed if self.predicted_routed else 0.0

    def snapshot(self) -> dict[str, float]:
        """Return every counter, the hit rate, and the predictions' precision and recall, by name."""
        counters = {name: getattr(self, name) for name in _COUNTERS}
        return {**counters, "hit_rate": self.hit_rate, "precision": self.precision, "recall": self.recall}
