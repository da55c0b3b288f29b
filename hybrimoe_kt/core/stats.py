"""Counters of what was decided; predicted seconds, never measured ones."""

from __future__ import annotations


class Stats:
    """Plain counters the coordinator adds to. `*_busy_s` are predicted seconds of each resource."""

    __slots__ = (
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
        "num_transfers",
        "pending",
        "prefetched_bytes",
        "transferred_bytes",
        "useful_prefetches",
        "wasted_prefetches",
    )

    def __init__(self) -> None:
        for name in self.__slots__:
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
    prefetched_bytes: int
    useful_prefetches: int
    wasted_prefetches: int
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

    def snapshot(self) -> dict[str, float]:
        """Return every counter and the hit rate, by name."""
        return {**{name: getattr(self, name) for name in self.__slots__}, "hit_rate": self.hit_rate}
