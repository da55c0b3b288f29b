"""A picture of a stretch of a timeline: what scheduler, GPU, CPU and link did between two moments."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from hybrimoe_kt.core.timeline import Span, Timeline
from hybrimoe_kt.errors import ConfigError

from .drawing import COLORS, DOTS_PER_INCH, WIDTH_INCHES, pyplot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ROWS = {"scheduler": 0, "gpu": 1, "cpu": 2, "link": 3}
_LOOKS = {
    ("scheduler", "replay"): ("replaying", "#c9ced6"),
    ("scheduler", "wait for routing"): ("waiting for the routing", "#e8eaed"),
    ("scheduler", "plan"): ("planning", COLORS[7]),
    ("scheduler", "choose prefetches"): ("choosing prefetches", COLORS[6]),
    ("gpu", "dense"): ("attention, dense", "#c9ced6"),
    ("gpu", "head"): ("attention, dense", "#c9ced6"),
    ("cpu", "dense"): ("attention, dense", "#c9ced6"),
    ("cpu", "head"): ("attention, dense", "#c9ced6"),
    ("gpu", "shared"): ("shared experts", COLORS[5]),
    ("cpu", "shared"): ("shared experts", COLORS[5]),
    ("gpu", "experts"): ("experts on the GPU", COLORS[0]),
    ("cpu", "experts"): ("experts on the CPU", COLORS[1]),
    ("link", "on_demand"): ("transfer on demand", COLORS[3]),
    ("link", "prefetch"): ("prefetch", COLORS[4]),
}
_WIDE = 0.006
"""Share of the picture's width at which bars that touch are kept apart by a white edge; thinner ones would vanish."""
_LABEL_SIZE = 7.5
_NEARLY_ALL = 0.7
_CHARACTER_PIXELS = 5.2
"""Of a label's font at this resolution, with its padding."""


class Window(NamedTuple):
    """A stretch of a timeline and what it is called."""

    start_s: float
    end_s: float
    name: str


def find_window(
    timeline: Timeline, *, step: int | None = None, from_ms: float | None = None, to_ms: float | None = None
) -> Window:
    """Return the whole of one step, or what lies between two moments; by default the last decode step.

    Milliseconds count from the timeline's beginning. ConfigError for a step or a stretch that it does not have.
    """
    origin_s = min(span.start_s for span in timeline.spans)
    end_s = max(span.end_s for span in timeline.spans)
    if from_ms is not None or to_ms is not None:
        start_s = origin_s + (from_ms or 0.0) / 1e3
        stop_s = end_s if to_ms is None else origin_s + to_ms / 1e3
        if not (origin_s <= start_s < stop_s and start_s < end_s):
            length_ms = (end_s - origin_s) * 1e3
            raise ConfigError(f"nothing to draw there: the timeline has {length_ms:.3f} ms, give --from less than --to")
        return Window(
            start_s, min(stop_s, end_s), f"{(start_s - origin_s) * 1e3:.1f} to {(stop_s - origin_s) * 1e3:.1f} ms"
        )
    steps = {int((span.details or {})["step"]): span for span in timeline.spans if span.kind == "step"}
    if not steps:
        return Window(origin_s, end_s, "everything")
    decode = [number for number, span in steps.items() if span.work == "decode"]
    number = max(decode or steps) if step is None else step
    if number not in steps:
        raise ConfigError(f"step {number} is not in the timeline; it has {min(steps)} to {max(steps)}")
    span = steps[number]
    tokens = (span.details or {}).get("tokens", 1)
    kind = "decode step" if span.work == "decode" else f"prompt of {tokens} tokens"
    return Window(span.start_s, span.end_s, f"{kind} (step {number})")


def drawn_spans(spans: Iterable[Span], window: Window) -> list[Span]:
    """What of the spans lies in the window, cut to it, in order; steps and what takes no time left out."""
    inside = [
        span._replace(start_s=max(span.start_s, window.start_s), end_s=min(span.end_s, window.end_s))
        for span in spans
        if span.kind != "step" and span.end_s > window.start_s and span.start_s < window.end_s
    ]
    return sorted(
        (span for span in inside if span.end_s > span.start_s), key=lambda span: (span.lane_name, span.start_s)
    )


def step_timeline(title: str, spans: Iterable[Span], start_s: float, end_s: float) -> Figure:
    """Draw what each lane did between two moments, milliseconds from the first, with expert ids where they fit."""
    plt = pyplot()
    drawn = drawn_spans(spans, Window(start_s, end_s, ""))
    lanes = sorted({(_ROWS[span.kind], span.lane, span.lane_name) for span in drawn})
    row_of = {name: row for row, (_, _, name) in enumerate(lanes)}
    figure: Figure
    figure, axis = plt.subplots(figsize=(WIDTH_INCHES, 1.5 + 0.5 * max(2, len(lanes))))
    seen: dict[str, Any] = {}
    for (kind, work), (name, color) in _LOOKS.items():
        mine = [span for span in drawn if (span.kind, span.work) == (kind, work)]
        for lane in sorted({span.lane_name for span in mine}):
            bars = [((s.start_s - start_s) * 1e3, (s.end_s - s.start_s) * 1e3) for s in mine if s.lane_name == lane]
            touch = kind == "link" and sum(width for _, width in bars) / len(bars) > _WIDE * 1e3 * (end_s - start_s)
            edge = 0.4 if touch else 0.0
            bar = axis.broken_barh(
                bars, (row_of[lane] - 0.36, 0.72), facecolor=color, edgecolor="white", linewidth=edge, label=name
            )
            seen.setdefault(name, bar)
    _label_experts(axis, drawn, row_of, start_s, end_s)
    axis.set_yticks(range(len(lanes)), [_short(name, lanes) for _, _, name in lanes])
    axis.invert_yaxis()
    axis.set_xlim(0, (end_s - start_s) * 1e3)
    axis.set_xlabel("milliseconds")
    axis.set_title(title, loc="left")
    axis.grid(axis="y", visible=False)
    figure.legend(seen.values(), seen, loc="outside lower center", ncols=4, columnspacing=1.2, handlelength=1.4)
    return figure


def _short(name: str, lanes: Sequence[tuple[int, int, str]]) -> str:
    """A lane's name, without its number where it is the only one of its kind."""
    kind = name.split()[0]
    return kind if sum(other.split()[0] == kind for _, _, other in lanes) == 1 else name


def _label_experts(axis: Any, spans: Sequence[Span], row_of: dict[str, int], start_s: float, end_s: float) -> None:
    """Write expert ids on the bars of those lanes where nearly all of them have room."""
    pixels_per_s = 0.86 * WIDTH_INCHES * DOTS_PER_INCH / (end_s - start_s)
    for lane in row_of:
        mine = [(span, " ".join(map(str, span.experts))) for span in spans if span.lane_name == lane and span.experts]
        fit = [
            (span, text)
            for span, text in mine
            if len(text) + 1 <= (span.end_s - span.start_s) * pixels_per_s / _CHARACTER_PIXELS
        ]
        if len(fit) < _NEARLY_ALL * len(mine):
            continue
        for span, text in fit:
            middle_ms = ((span.start_s + span.end_s) / 2 - start_s) * 1e3
            color = "black" if span.kind == "cpu" or span.work == "prefetch" else "white"
            axis.text(
                middle_ms, row_of[lane], text, ha="center", va="center", fontsize=_LABEL_SIZE, color=color, clip_on=True
            )
