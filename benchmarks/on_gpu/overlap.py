"""How much of a timeline's steps CPU, accelerators and links were busy, alone and together."""

from __future__ import annotations

from hybrimoe_kt.core.timeline import Timeline

__all__ = ["Spans", "both", "busy_shares", "length", "union"]

Spans = list[tuple[float, float]]


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


def union(spans: Spans) -> Spans:
    """The same time in spans that are in order and do not touch."""
    merged: Spans = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((start, end))
    return merged


def both(one: Spans, other: Spans) -> Spans:
    """The time in both; each is a `union`."""
    result: Spans = []
    i = j = 0
    while i < len(one) and j < len(other):
        start, end = max(one[i][0], other[j][0]), min(one[i][1], other[j][1])
        if start < end:
            result.append((start, end))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return result


def length(spans: Spans) -> float:
    return sum(end - start for start, end in spans)
