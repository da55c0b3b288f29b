"""How a recording's locality looks on a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hybrimoe_kt.sizes import size_text

from .chat_output import visible

__all__ = ["show"]

MOST_LAYERS = 16
"""Rows of the table; `--json` has all layers."""
_NAMES = {"stale_gate": "by their gates", "corrected_gate": "by gates corrected as they err"}


def show(facts: Mapping[str, Any], console: Console) -> None:
    """Print what was recorded and how local it is; `facts` is what `--json` prints."""
    locality = facts["locality"]
    title = (
        f"{facts['model']}: {locality['num_tokens']} tokens in {locality['num_steps']} steps, "
        f"{facts['num_layers']} layers, top {facts['top_k']} of {facts['num_experts']} experts"
    )
    console.print(Text(visible(title), style="bold"))
    console.print(_counted(facts["counters"]), style="dim")
    console.print()
    console.print(_overall(locality))
    console.print()
    console.print(_layers(locality))
    console.print(Text(visible(f"written: {facts['file']} ({size_text(facts['num_bytes'])})")), soft_wrap=True)


def _counted(counters: Mapping[str, Any]) -> str:
    if not counters["experts_on_gpu"] and not counters["num_transfers"]:
        return "every expert ran on the CPU"
    return (
        f"hit rate {counters['hit_rate']:.1%}, {counters['num_transfers']} transfers, {counters['num_prefetches']} "
        f"prefetches, experts: {counters['experts_on_cpu']} CPU, {counters['experts_on_gpu']} GPU"
    )


def _overall(locality: Mapping[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 1))
    table.add_column(min_width=34)
    for _ in locality["reuse"]:
        table.add_column(justify="right", min_width=4)
    _rows(table, "experts kept from the token so far back", locality["reuse"], {"": locality["reuse"].values()})
    coverage = {"choices that fall on them": locality["coverage"].values()}
    _rows(table, "the most used experts of a layer", locality["coverage"], coverage)
    named = {_NAMES[name]: shares for name, shares in locality["look_ahead_recall"].items() if any(shares)}
    if named:
        depths = range(1, 1 + max(map(len, named.values())))
        _rows(table, "experts named so many layers ahead", depths, named)
    return table


def _rows(table: Table, title: str, head: Iterable[Any], rows: Mapping[str, Iterable[float | None]]) -> None:
    table.add_row(title, *(str(name) for name in head), style="dim")
    for name, values in rows.items():
        table.add_row(f"  {name}" if name else "", *(_percent(value) for value in values))


def _layers(locality: Mapping[str, Any]) -> Table:
    rows = locality["layers"]
    shown = (
        rows
        if len(rows) <= MOST_LAYERS
        else [rows[i * (len(rows) - 1) // (MOST_LAYERS - 1)] for i in range(MOST_LAYERS)]
    )
    note = "" if shown is rows else f", {len(shown)} of {len(rows)} layers; --json has all"
    title = f"entropy in bits (even: {locality['max_entropy_bits']:.1f}){note}"
    table = Table(title=title, title_justify="left")
    for name in ("layer", "of use", "of router", "kept from last", "most used", "unused"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in shown:
        router = row["router_entropy_bits"]
        table.add_row(
            str(row["layer"]),
            f"{row['usage_entropy_bits']:.2f}",
            "-" if router is None else f"{router:.2f}",
            _percent(row["reuse"]),
            f"{row['top_expert']} ({row['top_expert_share']:.0%})",
            str(row["unused_experts"]),
        )
    return table


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
