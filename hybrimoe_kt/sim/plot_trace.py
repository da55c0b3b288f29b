"""Pictures of recorded routing: which experts are used, and how caches of some size fare with it over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .drawing import COLORS, WIDTH_INCHES, pyplot
from .hit_rate import Lookup

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_ROWS = 26


def heat_map(title: str, layers: Sequence[int], shares: npt.NDArray[np.floating], *, is_sorted: bool = False) -> Figure:
    """Draw the share of tokens that chose each expert, `[num_layers, num_experts]`, one row per layer."""
    plt = pyplot()
    figure: Figure
    num_layers, num_experts = shares.shape
    figure, axis = plt.subplots(figsize=(WIDTH_INCHES, 1.6 + min(4.4, 0.22 * num_layers + 0.3)))
    scale = plt.matplotlib.colors.PowerNorm(0.5, vmin=0)  # a few experts would leave all others dark
    image = axis.imshow(100 * shares, aspect="auto", cmap="cividis", norm=scale, interpolation="nearest")
    every = -(-num_layers // _MOST_ROWS)
    axis.set_yticks(range(0, num_layers, every), [str(layer) for layer in layers[::every]])
    axis.tick_params(labelsize=10)
    axis.set_ylabel("layer")
    axis.set_xlabel("experts of the layer, the most used first" if is_sorted else "expert")
    axis.set_title(title, loc="left")
    axis.grid(visible=False)
    even = 100 * float(shares.sum(axis=1).mean()) / num_experts
    bar = figure.colorbar(image, ax=axis, pad=0.02)
    bar.set_label(f"% of tokens (even: {even:.1f})")
    bar.outline.set_visible(False)
    return figure


def hit_rate_over_time(
    title: str, curves: Mapping[str, Mapping[str, Sequence[float]]], requests: Sequence[int], window: int
) -> Figure:
    """Draw one panel per cache size, one line per policy: the hit rate of the last `window` steps at each step.

    `requests` are the steps at which another request begins.
    """
    plt = pyplot()
    figure: Figure
    figure, axes = plt.subplots(
        len(curves), 1, figsize=(WIDTH_INCHES, 1.3 + 1.75 * len(curves)), sharex=True, sharey=True, squeeze=False
    )
    for axis, (size, lines) in zip(axes[:, 0], curves.items(), strict=True):
        for number, (policy, rates) in enumerate(lines.items()):
            is_bound = policy == "belady"
            axis.plot(
                [100 * rate for rate in rates],
                "--" if is_bound else "-",
                color="black" if is_bound else COLORS[number % (len(COLORS) - 1)],
                linewidth=1.6,
                label="belady (knows the future)" if is_bound else policy,
            )
        for step in requests:
            axis.axvline(step, color="#888888", linewidth=0.8, linestyle=":")
        axis.set_title(f"{size} on the GPU", loc="left", fontsize=11)
        axis.margins(x=0.01)
    axes[0][0].set_ylim(_lowest(curves, window), 102)
    axes[-1][0].set_xlabel("step" + (" (dotted: another request begins)" if requests else ""))
    figure.supylabel(f"hit rate of the last {window} steps, %", fontsize=11)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)), columnspacing=1.4)
    return figure


def occupancy_chart(title: str, lookups: Sequence[Lookup], num_experts: int, first_step: int = 0) -> Figure:
    """Draw when each expert was in a slot, with its hits and misses; one row per expert, one column per step."""
    plt = pyplot()
    steps = range(first_step, first_step + len(lookups))
    figure: Figure
    figure, axis = plt.subplots(figsize=(WIDTH_INCHES, 1.9 + min(6.0, 0.1 * num_experts + 0.6)))
    resident = np.zeros((num_experts, len(lookups)), dtype=bool)
    for column, found in enumerate(lookups):
        resident[[expert for expert in found.occupant if expert >= 0], column] = True
    for expert in range(num_experts):
        axis.broken_barh(_runs(resident[expert], first_step), (expert - 0.42, 0.84), facecolor="#bcd9ec", linewidth=0)
    size = min(26.0, 40_000 / max(1, len(lookups)) / max(40, num_experts))
    for name, marker, color, points in (
        (
            "hit",
            "o",
            COLORS[0],
            [(s, e) for s, f in zip(steps, lookups, strict=True) for e in f.routing.loads if e not in f.missing],
        ),
        ("miss", "x", COLORS[3], [(s, e) for s, f in zip(steps, lookups, strict=True) for e in f.missing]),
    ):
        x, y = zip(*points, strict=True) if points else ((), ())
        axis.scatter(
            x,
            y,
            s=size if marker == "x" else size * 0.6,
            marker=marker,
            color=color,
            linewidth=1.2 if marker == "x" else 0,
            label=name,
        )
    axis.set_xlim(first_step - 0.5, first_step + len(lookups) - 0.5)
    axis.set_ylim(-0.6, num_experts - 0.4)
    axis.set_xlabel("step")
    axis.set_ylabel("expert")
    axis.set_title(title, loc="left")
    axis.grid(visible=False)
    handles: list[Any] = [plt.Rectangle((0, 0), 1, 1, color="#bcd9ec"), *axis.get_legend_handles_labels()[0]]
    figure.legend(handles, ["in a slot", "hit", "miss"], loc="outside lower center", ncols=3, markerscale=2)
    return figure


def _lowest(curves: Mapping[str, Mapping[str, Sequence[float]]], window: int) -> float:
    """Where the axis begins, %: below what caches reach once they are full, so that policies are told apart."""
    lines = [rates for lines in curves.values() for rates in lines.values()]
    settled = [min(rates[window:] or rates) for rates in lines]
    return max(-2.0, 10 * float(np.floor(10 * min(settled))) - 10)


def _runs(present: npt.NDArray[np.bool_], first_step: int) -> list[tuple[float, int]]:
    """Stretches of consecutive steps as (left edge, width)."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], present.astype(np.int8), [0]])))
    return [(first_step + begin - 0.5, end - begin) for begin, end in edges.reshape(-1, 2).tolist()]
