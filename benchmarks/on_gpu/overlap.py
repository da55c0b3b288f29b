"""How much of a timeline's steps CPU, accelerators and links were busy, alone and together."""

from __future__ import annotations

from hybrimoe_kt.core.intervals import both, length, union
from hybrimoe_kt.core.timeline import Timeline

__all__ = ["busy_shares"]


def busy_shares(timeline: Timeline, skip: int = 2) -> dict[str, float]:
    """Shares of the steps' time, without the first `skip` steps; empty if there are none."""
    steps = union([(span.start_s, span.end_s) for span in timeline.spans if span.kind == "step"][skip:])
    total = length(steps)
    if not total:
        return {}
    busy = {
        kind: both(union([(span.start_s, span.end_s) for span in timeline.spans if span.kind == kind]), steps)
        for kind in ("cpu", "gpu", "link")
    }
    shares = {kind: length(spans) / total for kind, spans in busy.items()}
    shares["cpu_and_gpu"] = length(both(busy["cpu"], busy["gpu"])) / total
    shares["link_beside"] = length(both(busy["link"], union(busy["cpu"] + busy["gpu"]))) / total
    return shares
