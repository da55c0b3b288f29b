"""What a device counts of the steps that it plans, and what that is in the coordinator's counters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .decision_table import DecisionTable
from .layer_state import LayerState
from .stats import Stats

__all__ = ["DeviceCounts"]


class DeviceCounts(NamedTuple):
    """Of one layer, since it was last asked."""

    visits: Sequence[int]
    """How often each entry of the decision table was followed."""
    totals: Sequence[int]
    """Experts brought, experts on the CPU, prefetches into the layer, admissions."""
    hits: Sequence[int]
    """`[num_experts]`: steps that routed to an expert and found it ready."""
    misses: Sequence[int]
    """`[num_experts]`: and did not."""

    def add_to(self, stats: Stats, state: LayerState, table: DecisionTable) -> float:
        """Add them; returns the seconds that these steps are predicted to have taken, and what lies between layers."""
        cost, elapsed_s = state.cost, 0.0
        for index, visits in enumerate(self.visits):
            if not visits:
                continue
            held, arriving, missing = table.counts(index)
            entry = table.entry(index)
            stats.num_plans += visits
            stats.hits += visits * held
            stats.pending += visits * arriving
            stats.misses += visits * missing
            stats.experts_on_gpu += visits * (held + arriving + missing)
            stats.cpu_busy_s += visits * entry.cpu_s
            stats.gpu_busy_s += visits * entry.gpu_s
            stats.makespan_s += visits * entry.makespan_s
            elapsed_s += visits * (entry.makespan_s + cost.between_layers_s[1])
        brought, on_cpu, prefetched, admitted = self.totals
        num_bytes, num_ahead = state.spec.expert_bytes, prefetched + admitted
        stats.experts_on_cpu += on_cpu
        stats.experts_on_gpu -= on_cpu
        stats.num_transfers += brought
        stats.transferred_bytes += brought * num_bytes
        stats.num_prefetches += num_ahead
        stats.prefetched_bytes += num_ahead * num_bytes
        stats.link_busy_s += (brought + num_ahead) * cost.expert_transfer_s
        stats.elapsed_s += elapsed_s
        state.hits = [old + more for old, more in zip(state.hits, self.hits, strict=True)]
        state.misses = [old + more for old, more in zip(state.misses, self.misses, strict=True)]
        return elapsed_s
