"""Timelines as files in the Chrome trace format, which Perfetto and chrome://tracing open."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from hybrimoe_kt.core.timeline import Kind, Span, Timeline
from hybrimoe_kt.errors import ConfigError

_ORDER = {kind: number for number, kind in enumerate(get_args(Kind))}
_MICRO = 1e6


def chrome_trace(timeline: Timeline) -> dict[str, object]:
    """Return the JSON object: one complete event per span, microseconds from the first, one thread per lane.

    `args` say which layer and experts it is about, and what a plan decided; `otherData` where the times come from.
    """
    rows = sorted(timeline.spans, key=lambda span: (span.start_s, _ORDER[span.kind], span.lane, span.end_s))
    origin_s = rows[0].start_s if rows else 0.0
    lanes = sorted({(_ORDER[span.kind], span.lane, span.lane_name) for span in rows})
    thread = {name: number for number, (_, _, name) in enumerate(lanes, start=1)}
    names: list[dict[str, object]] = [{"name": "process_name", "ph": "M", "pid": 1, "args": {"name": "hybrimoe_kt"}}]
    for name, number in thread.items():
        names.append({"name": "thread_name", "ph": "M", "pid": 1, "tid": number, "args": {"name": name}})
        names.append({"name": "thread_sort_index", "ph": "M", "pid": 1, "tid": number, "args": {"sort_index": number}})
    events: list[dict[str, object]] = [
        {
            "name": span.label,
            "cat": span.kind,
            "ph": "X",
            "pid": 1,
            "tid": thread[span.lane_name],
            "ts": round((span.start_s - origin_s) * _MICRO, 3),
            "dur": round((span.end_s - span.start_s) * _MICRO, 3),
            "args": _args(span),
        }
        for span in rows
    ]
    other = dict(timeline.info) | ({"note": timeline.note} if timeline.note else {})
    return {"displayTimeUnit": "ms", "otherData": other, "traceEvents": names + events}


def _args(span: Span) -> dict[str, Any]:
    about: dict[str, Any] = {"work": span.work}
    if span.layer >= 0:
        about["layer"] = span.layer
    if span.experts:
        about["experts"] = list(span.experts)
    return about | dict(span.details or {})


def write_timeline(timeline: Timeline, path: str | Path) -> Path:
    """Write the timeline as JSON and return its path."""
    file = Path(path)
    try:
        file.write_text(json.dumps(chrome_trace(timeline), allow_nan=False), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{file}: the timeline cannot be written ({error.strerror}); name a writable file") from None
    return file


def read_timeline(path: str | Path) -> Timeline:
    """Read back what `write_timeline` wrote; ConfigError for anything else."""
    file = Path(path)
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: the timeline cannot be opened ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise ConfigError(f"{file}: not a timeline, which is JSON as --timeline writes it") from None
    try:
        events = data["traceEvents"]
        names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
        timeline = Timeline(len(events), **data.get("otherData", {}))
        for event in events:
            if event["ph"] == "X":
                timeline.add(_span(event, names[event["tid"]]))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ConfigError(f"{file}: not a timeline as --timeline writes it ({type(error).__name__}: {error})") from None
    if not timeline.spans:
        raise ConfigError(f"{file}: an empty timeline; nothing was computed while it was recorded")
    return timeline


def _span(event: Mapping[str, Any], lane_name: str) -> Span:
    args = dict(event["args"])
    number = int(lane_name.split()[1]) if " " in lane_name else 0
    kind, start_s = event["cat"], event["ts"] / _MICRO
    if kind not in _ORDER:
        raise ValueError(f"unknown kind {kind!r}")
    work, layer, experts = args.pop("work"), int(args.pop("layer", -1)), tuple(args.pop("experts", ()))
    return Span(
        kind, number, start_s, start_s + event["dur"] / _MICRO, event["name"], work, layer, experts, args or None
    )
