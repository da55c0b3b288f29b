"""BF16: the upper halves of float32 values, read as F16 is."""

from __future__ import annotations

import triton
import triton.language as tl

from .f16 import tile_of, unit_of

__all__ = ["KIND", "tile", "unit"]

KIND = tl.constexpr(30)


@triton.jit
def unit(mem, tables, o0, o1, o2, o3, row, unit, columns, x, xq, xs, xm, FORM: tl.constexpr):
    return unit_of(mem, o0, row, unit, columns, x, True)


@triton.jit
def tile(mem, tables, o0, o1, o2, o3, row, half, lane, step, columns):
    return tile_of(mem, o0, row, half, lane, step, columns, True)
