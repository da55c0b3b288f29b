"""The report's tables: which of a row's values stand in which column."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

__all__ = ["TABLES", "Column", "Table", "markdown"]


class Column(NamedTuple):
    """`key` of a row's values; `show` makes text of it."""

    key: str
    title: str
    show: Callable[[Any], str]


class Table(NamedTuple):
    """One table: the rows of `source`, whose names stand under `head`; `title` above it, none if empty."""

    source: str
    head: str
    columns: tuple[Column, ...]
    title: str = ""


def _number(digits: int) -> Callable[[Any], str]:
    return lambda value: f"{value:.{digits}f}"


def _significant(value: Any) -> str:
    """Three digits that mean something: 0.0123, 1.23, 123, 12346."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _percent(value: Any) -> str:
    return f"{100 * value:.0f} %"


def _signed(value: Any) -> str:
    return f"{100 * value:+.0f} %" if value < 10 else f"{value + 1:.0f}x"


def _times(value: Any) -> str:
    return f"{value:.2f}x"


_VALUE = Column("value", "value", lambda value: value if isinstance(value, str) else _significant(value))
_US = ("replay", "read", "plan", "submit_and_gpu", "prefetch", "wait")


def _methods() -> tuple[Table, ...]:
    first = (
        Column("ms", "ms", _number(2)), Column("p90_ms", "p90", _number(2)), Column("hit_rate", "hits", _percent),
        Column("cpu_experts", "on CPU", _number(2)), Column("transfers", "sent", _number(1)),
        Column("prefetches", "ahead", _number(1)),
    )  # fmt: skip
    parts = tuple(Column(f"{part}_us", part.removesuffix("_and_gpu"), _number(0)) for part in _US)
    shares = (
        Column("cpu", "CPU", _percent), Column("gpu", "GPU", _percent), Column("link", "link", _percent),
        Column("cpu_and_gpu", "CPU and GPU", _percent), Column("link_beside", "link beside either", _percent),
        Column("predicted_us", "predicted us", _number(0)), Column("step_us", "step us", _number(0)),
        Column("off_by", "off by", _signed),
    )  # fmt: skip
    return (
        Table("methods", "cached, method", first, "Methods"),
        Table("methods", "cached, method", parts, "Where a layer's time goes, us"),
        Table("methods", "cached, method", shares, "Overlap and prediction"),
    )


TABLES: dict[str, tuple[Table, ...]] = {
    "machine": (Table("machine", "", (_VALUE,)),),
    "tests": (
        Table("tests", "tests", tuple(Column(key, key, str) for key in ("passed", "failed", "skipped"))),
    ),
    "link": (Table("link", "probe", (_VALUE, Column("unit", "unit", str))),),
    "kernels": (
        Table("bandwidth", "yardstick", (_VALUE, Column("unit", "unit", str))),
        Table("kernels", "model, gate/up/down, tokens", (
            Column("us", "us a layer", _number(1)), Column("experts", "experts", _number(1)),
            Column("gb_per_s", "GB/s", _number(0)), Column("of_copy", "of copy", _percent),
            Column("of_roofline", "of roofline", _percent), Column("host_us", "host us", _number(0)),
            Column("over_torch", "over torch", _times),
        )),
        Table("linears", "layer, type, tokens", (
            Column("us", "us a layer", _number(1)), Column("gb_per_s", "GB/s", _number(0)),
            Column("of_copy", "of copy", _percent), Column("host_us", "host us", _number(0)),
        ), "Linear layers"),
    ),
    "model": (
        Table("model", "", (
            Column("GB", "GB", _number(2)), Column("layers", "layers", str),
            Column("generated_s", "generated in s", _number(1)), Column("load_s", "loaded in s", _number(1)),
        )),
        Table("right", "answers of", (Column("worst", "worst relative error", _significant),), "Answers"),
        *_methods(),
    ),
    "llama": (
        Table("llama.cpp", "experts", (
            Column("ms", "ms", _number(2)), Column("decode", "tokens/s", _number(1)),
            Column("prefill_512", "prompt of 512, tokens/s", _number(0)),
        )),
    ),
    "clock": (
        Table("plans on the clock", "cached, method", (
            Column("token_ms", "ms a token", _number(2)), Column("hybrid_speedup", "hybrid is faster by", _times),
            Column("step_ms", "step ms", _number(2)), Column("predicted_ms", "predicted ms", _number(2)),
            Column("step_error", "off by", _signed), Column("hit_rate", "hits", _percent),
        )),
    ),
}  # fmt: skip


def markdown(table: Table, rows: Sequence[dict[str, Any]], *, notes: bool) -> str:
    """The table of `rows`, with a column of notes if any has one; empty without rows.

    A row that was not measured shows its state in the first column of values, and no value in any other.
    """
    columns = [*table.columns, *_prompts(table, rows)]
    columns = [column for column in columns if not rows or any(column.key in row["values"] for row in rows)] or columns[
        :1
    ]
    with_notes = notes and any(row["note"] for row in rows)
    titles = [table.head, *(column.title for column in columns), *(["note"] if with_notes else [])]
    lines = [
        _line(titles),
        "|---|" + "".join(_rule(column, rows) for column in columns) + ("---|" if with_notes else ""),
    ]
    for row in rows:
        cells = [_cell(column, row["values"]) for column in columns]
        if row["state"] != "measured":
            word = row["note"].split(":")[0] if row["state"] == "unclean" else row["state"]
            cells = [f"**{word}**", *("-" for _ in columns[1:])]
        lines.append(_line([row["name"], *cells, *([row["note"]] if with_notes else [])]))
    return "\n".join(lines) if rows else ""


def _rule(column: Column, rows: Sequence[dict[str, Any]]) -> str:
    """Numbers to the right, words to the left."""
    return "---|" if any(isinstance(row["values"].get(column.key), str) for row in rows) else "--:|"


def _prompts(table: Table, rows: Sequence[dict[str, Any]]) -> list[Column]:
    """How long prompts were is the run's choice."""
    if table.title != "Methods":
        return []
    lengths = sorted(
        {int(key.removeprefix("prefill_")) for row in rows for key in row["values"] if key.startswith("prefill_")}
    )
    return [Column(f"prefill_{length}", f"prompt of {length}, tokens/s", _number(0)) for length in lengths]


def _cell(column: Column, values: dict[str, Any]) -> str:
    value = values.get(column.key)
    return "-" if value is None else column.show(value)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
