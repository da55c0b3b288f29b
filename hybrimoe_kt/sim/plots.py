"""Pictures of experiments: speed-ups over static placement, hit rate over capacity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .drawing import COLORS, MARKERS, WIDTH_INCHES, pyplot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LABELLED = ("default",)
"""Bars that carry their number; all of them would overlap."""

Speedups = Mapping[str, Mapping[str, Mapping[str, float]]]
"""model -> cache ratio -> method -> speed-up."""


def speedup_bars(panels: Mapping[str, Speedups]) -> Figure:
    """Draw one row of panels per title (prefill, decode), one panel per model, one group per cache ratio."""
    plt = pyplot()
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
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
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
    plt = pyplot()
    figure: Figure
    figure, axis = plt.subplots(figsize=(WIDTH_INCHES * 0.9, 4.2))
    shares = [100 * count / num_experts for count in slots]
    for number, (policy, rates) in enumerate(curves.items()):
        dash = "--" if policy == "belady" else "-"
        color = "black" if policy == "belady" else COLORS[number % len(COLORS)]
        marker = MARKERS[number % len(MARKERS)]
        axis.plot(shares, [100 * rate for rate in rates], dash, marker=marker, markersize=5, label=policy, color=color)
    axis.set_xlabel("experts that fit on the GPU, % of each layer")
    axis.set_ylabel("decode hit rate, %")
    axis.set_title(title)
    axis.legend(loc="lower right")
    return figure
