"""The gate's findings as Markdown."""

from __future__ import annotations

from collections.abc import Iterable

from hybrimoe_kt.kernels.targets import TARGETS

from .build import Measurement
from .cases import Case
from .headroom import headroom, tensor_share

__all__ = ["markdown"]

_INTRO = """# What the kernels compile to

Written by `make kernels`; do not edit. Triton {version}, no GPU involved: every number is read from machine code.
Instructions are those of the main loop, per warp and iteration. *Headroom* (decode) and *tensor share* (prefill) are
arithmetic on these counts and on published clocks and bandwidths, upper bounds of what a GPU will show; both are
defined in `tools/kernel_lab/headroom.py` and discussed in [kernels.md](kernels.md).
"""

_HEAD = (
    "| kernel | registers | spilled | shared | instructions | 16-byte loads | other loads | tensor | dot | conversions "
    "| headroom or tensor share |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n"
)


def markdown(findings: Iterable[tuple[Case, Measurement]], version: str) -> str:
    """Return the whole document, one table a target."""
    rows: dict[str, list[str]] = {}
    for case, found in findings:
        rows.setdefault(found.target, []).append(_row(case, found))
    parts = [_INTRO.format(version=version)]
    for name, target in TARGETS.items():
        if name in rows:
            title = f"\n## {name}: {target.product}, {target.dram_bytes_per_s / 1e9:.0f} GB/s\n\n"
            parts.append(title + _HEAD + "".join(rows[name]))
    return "".join(parts)


def _row(case: Case, found: Measurement) -> str:
    loop = found.loop
    numbers = (found.resources.registers, found.resources.spilled_bytes, found.shared_bytes)
    counts = (loop.all, loop.wide_loads, loop.narrow_loads, loop.tensor, loop.dot, loop.conversions)
    cells = " | ".join(str(number) for number in (*numbers, *counts))
    return f"| {case.op} {case.variant} | {cells} | {_speed(case, found)} |\n"


def _speed(case: Case, found: Measurement) -> str:
    ratio, share = headroom(case, found), tensor_share(case, found)
    if ratio is not None:
        return f"{ratio:.1f}x"
    return f"{100 * share:.0f} %" if share is not None else ""
