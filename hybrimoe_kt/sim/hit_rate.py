"""Hit rates of cache policies alone on a trace's decode steps: every miss is fetched, no machine is simulated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hybrimoe_kt.core.hit_rate import measure_hit_rate
from hybrimoe_kt.sim.trace import Trace


def future(trace: Trace) -> dict[int, list[list[int]]]:
    """Return layer -> the experts of each step, prompt included: what the offline policy knows."""
    return {
        layer: [list(trace.routing(step, position).loads) for step in trace.steps]
        for position, layer in enumerate(trace.layers)
    }


def hit_rate(
    trace: Trace, policy: str, num_slots: int, options: Mapping[str, Any] | None = None, *, bypass: bool = False
) -> float:
    """Return the share of routed experts of the decode steps found in one of `num_slots` slots per layer.

    Caches start empty. `belady` is told the future; `bypass` keeps a fetched expert only if it is worth more than
    what it would evict.
    """
    steps = list(trace.phase_steps("decode"))
    given = dict(options or {})
    if policy == "belady":
        given["future"] = {
            layer: [list(trace.routing(step, position).loads) for step in steps]
            for position, layer in enumerate(trace.layers)
        }
    routings = [trace.routing(step, position) for step in steps for position in range(len(trace.layers))]
    return measure_hit_rate(routings, trace.specs(num_slots), policy, given, bypass=bypass)


def hit_rate_curves(trace: Trace, policies: Sequence[str], slots: Sequence[int]) -> dict[str, list[float]]:
    """Return each policy's hit rate at each number of slots per layer."""
    return {policy: [hit_rate(trace, policy, count) for count in slots] for policy in policies}
