"""Pictures of simulations, sized to be legible at the width of a README. Needs matplotlib (extra `plot`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrimoe_kt.errors import ConfigError
from hybrimoe_kt.sim.machine import Span
from hybrimoe_kt.sim.timeline import lane_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH_INCHES = 9.0
DOTS_PER_INCH = 110
COLORS = ("#4c72b0", "#dd8452", "#55a868", "#8172b3", "#c44e52", "#937860", "#64b5cd", "#8c8c8c")
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.axisbelow": True,
    "svg.hashsalt": "hybrimoe",
    "figure.constrained_layout.use": True,
}
FORMATS = (".png", ".svg")
LABELLED = ("default",)
"""Bars that carry their number; all of them would overlap."""

Speedups = Mapping[str, Mapping[str, Mapping[str, float]]]
"""model -> cache ratio -> method -> speed-up."""


def speedup_bars(panels: Mapping[str, Speedups]) -> Figure:
    """Draw one row of panels per title (prefill, decode), one panel per model, one group per cache ratio."""
    plt = _pyplot()
    models = list(next(iter(panels.values())))
    figure: Figure
    figure, axes = plt.subplots(
        len(panels), len(models), figsize=(WIDTH_INCHES, 2.9 * len(panels)), sharey="row", squeeze=False
    )
    for row, (title, speedups) in zip(axes, panels.items(), strict=True):
        for axis, model in zip(row, models, strict=True):
            _bar_groups(axis, speedups[model])
            axis.set_title(f"{model}, {title}", fontsize=11)
        row[0].set_ylabel("speed-up over static")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def _bar_groups(axis: Any, groups: Mapping[str, Mapping[str, float]]) -> None:
    methods = list(next(iter(groups.values())))
    width = 0.8 / len(methods)
    for number, method in enumerate(methods):
        values = [group[method] for group in groups.values()]
        places = [place + (number - (len(methods) - 1) / 2) * width for place in range(len(groups))]
        bars = axis.bar(places, values, width * 0.92, label=method, color=COLORS[number % len(COLORS)])
        if method in LABELLED:
            axis.bar_label(bars, fmt="%.1f", fontsize=8, padding=1)
    axis.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
    axis.set_xticks(range(len(groups)), list(groups))
    axis.grid(axis="x", visible=False)


def hit_rate_lines(title: str, slots: Sequence[int], num_experts: int, curves: Mapping[str, Sequence[float]]) -> Figure:
    """Draw hit rate over the share of experts that fit, one line per policy."""
    plt = _pyplot()
    figure: Figure
    figure, axis = plt.subplots(figsize=(WIDTH_INCHES * 0.75, 4.2))
    shares = [100 * count / num_experts for count in slots]
    for number, (policy, rates) in enumerate(curves.items()):
        dash = "--" if policy == "belady" else "-"
        color = "black" if policy == "belady" else COLORS[number % len(COLORS)]
        axis.plot(shares, [100 * rate for rate in rates], dash, marker="o", markersize=4, label=policy, color=color)
    axis.set_xlabel("experts that fit on the GPU, % of each layer")
    axis.set_ylabel("decode hit rate, %")
    axis.set_title(title, fontsize=12)
    axis.legend(frameon=False, loc="lower right")
    return figure


def step_timeline(title: str, spans: Iterable[Span], start_s: float, end_s: float) -> Figure:
    """Draw what GPU, CPU and link did between two moments, milliseconds from the first."""
    plt = _pyplot()
    rows = {"GPU": 0, "CPU": 1, "link": 2}
    figure: Figure
    figure, axis = plt.subplots(figsize=(WIDTH_INCHES, 3.0))
    drawn: dict[str, Any] = {}
    for span in sorted(spans):
        begin, end = max(span.start_s, start_s), min(span.end_s, end_s)
        if begin >= end:
            continue
        row = rows[lane_name(span).split()[0]]
        kind, color = _look(span)
        edge = 0.5 if span.kind == "link" else 0.0
        bar = axis.barh(row, (end - begin) * 1e3, left=(begin - start_s) * 1e3, height=0.7, color=color,
                        edgecolor="white", linewidth=edge)  # fmt: skip
        drawn.setdefault(kind, bar)
    axis.set_yticks(list(rows.values()), list(rows))
    axis.invert_yaxis()
    axis.set_xlim(0, (end_s - start_s) * 1e3)
    axis.set_xlabel("milliseconds")
    axis.set_title(title, fontsize=12)
    axis.grid(axis="y", visible=False)
    figure.legend(drawn.values(), drawn, loc="outside lower center", ncols=3, frameon=False, fontsize=10)
    return figure


def _look(span: Span) -> tuple[str, str]:
    if span.kind == "cpu":
        return "experts on the CPU", COLORS[1]
    if span.kind == "link":
        return ("prefetch", COLORS[3]) if span.label.endswith("prefetch") else ("on-demand transfer", COLORS[4])
    if span.label.endswith("dense") or span.label == "head":
        return "attention, dense", "#c9ced6"
    return ("shared experts", COLORS[6]) if span.label.endswith("shared") else ("experts on the GPU", COLORS[0])


def save(figure: Figure, path: str | Path) -> Path:
    """Write PNG or SVG by the file's ending, the same bytes for the same picture, and return the path."""
    file = Path(path)
    if file.suffix not in FORMATS:
        raise ConfigError(f"{file}: pictures end in .png or .svg, not {file.suffix or 'nothing'!r}")
    plain = {"Date": None} if file.suffix == ".svg" else {"Software": None}
    try:
        figure.savefig(file, dpi=DOTS_PER_INCH, metadata=plain)
    except OSError as error:
        raise ConfigError(f"{file}: the picture cannot be written ({error.strerror}); name a writable file") from None
    _pyplot().close(figure)
    return file


def _pyplot() -> Any:
    try:
        import matplotlib as mpl
    except ImportError:
        raise ConfigError("drawing needs matplotlib: pip install 'hybrimoe-kt[plot]'") from None
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update(STYLE)
    return plt
