"""Small Markdown helpers for generated documents."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, align: str = "") -> str:
    """Return a table; `align` has l or r per column, by default the first is left and the others right."""
    sides = align or "l" + "r" * (len(header) - 1)
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join("---" if side == "l" else "---:" for side in sides) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def times(value: float) -> str:
    """Return "1.70x"."""
    return f"{value:.2f}x"


def percent(value: float, digits: int = 1) -> str:
    """Return "52.8 %"."""
    return "-" if math.isnan(value) else f"{100 * value:.{digits}f} %"


def seconds(value: float) -> str:
    """Return a time with the unit that suits it."""
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.1f} ms"


def mean(values: Iterable[float]) -> float:
    """Return the arithmetic mean, the paper's kind of average."""
    rows = list(values)
    return sum(rows) / len(rows)


def verdict(is_met: bool) -> str:
    return "met" if is_met else "**not met**"
