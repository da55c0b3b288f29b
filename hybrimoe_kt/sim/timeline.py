"""Timelines in the Chrome trace format, which Perfetto and chrome://tracing open."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from hybrimoe_kt.errors import ConfigError
from hybrimoe_kt.sim.machine import Span

_ORDER = {"gpu": 0, "cpu": 1, "link": 2}
_MICRO = 1e6


def lane_name(span: Span) -> str:
    """Return the row a span is drawn in."""
    return "CPU" if span.kind == "cpu" else f"{'GPU' if span.kind == 'gpu' else 'link'} {span.lane}"


def chrome_trace(spans: Iterable[Span]) -> dict[str, object]:
    """Return the JSON object; one complete event per span, microseconds, one thread per resource."""
    rows = sorted(spans, key=lambda span: (span.start_s, _ORDER[span.kind], span.lane))
    lanes = sorted({(_ORDER[span.kind], span.lane, lane_name(span)) for span in rows})
    thread = {name: number for number, (_, _, name) in enumerate(lanes, start=1)}
    names: list[dict[str, object]] = [
        {"name": "thread_name", "ph": "M", "pid": 1, "tid": number, "args": {"name": name}}
        for name, number in thread.items()
    ]
    events: list[dict[str, object]] = [
        {
            "name": span.label,
            "cat": span.kind,
            "ph": "X",
            "pid": 1,
            "tid": thread[lane_name(span)],
            "ts": round(span.start_s * _MICRO, 3),
            "dur": round((span.end_s - span.start_s) * _MICRO, 3),
        }
        for span in rows
    ]
    return {"displayTimeUnit": "ms", "traceEvents": names + events}


def write_timeline(spans: Iterable[Span], path: str | Path) -> Path:
    """Write the timeline as JSON and return its path."""
    file = Path(path)
    try:
        file.write_text(json.dumps(chrome_trace(spans)), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{file}: the timeline cannot be written ({error.strerror}); name a writable file") from None
    return file
