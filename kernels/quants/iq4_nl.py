"""IQ4_NL: planes qs (as Q4_0, but nibbles are places in a table), d. Columns are those of Q4_0."""

from __future__ import annotations

import triton
import triton.language as tl
from gguf.quants import IQ4_NL

from hybrimoe_kt.kernels.blocks.fields import plane_scale, words_at
from hybrimoe_kt.kernels.blocks.lookup import floats, look_up, table
from hybrimoe_kt.kernels.blocks.words import dot16, words

__all__ = ["KIND", "T0", "T1", "T2", "T3", "tile", "unit"]

KIND = tl.constexpr(20)
T0, T1, T2, T3 = table(IQ4_NL.kvalues)


@triton.jit
def unit(mem, tables, o0, o1, o2, o3, row, unit, columns, x, xq, xs, xm, FORM: tl.constexpr):
    number = row * (columns // 32) + unit
    low, high = look_up(words(words_at(mem, o0), 4 * number), T0, T1, T2, T3, FORM)
    x_at = tl.broadcast_to(8 * unit, number.shape)
    total = dot16(low, words(xq, x_at), FORM) + dot16(high, words(xq, x_at + 4), FORM)
    return total.to(tl.float32) * plane_scale(mem, o1, number) * tl.load(xs + (x_at >> 3))


@triton.jit
def tile(mem, tables, o0, o1, o2, o3, row, half, lane, step, columns, FORM: tl.constexpr):
    blocks = columns // 32
    number = row * blocks + tl.minimum(2 * step + half, blocks - 1)
    quants = tl.load(words_at(mem, o0) + (4 * number + tl.arange(0, 4)[None, None, :]))
    low, high = look_up(quants, T0, T1, T2, T3, FORM)
    scale = plane_scale(mem, o1, number)
    return floats(low, FORM) * scale, floats(high, FORM) * scale
