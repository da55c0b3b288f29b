"""Spans of time, as pairs of a beginning and an end."""

from __future__ import annotations

__all__ = ["Spans", "both", "length", "union"]

Spans = list[tuple[float, float]]


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
    """How long all of them take together, one after the other."""
    return sum(end - start for start, end in spans)
