"""MXFP4: planes qs (as IQ4_NL, another table), e (a byte a block, a power of two). Columns are those of Q4_0."""

from __future__ import annotations

import triton
import triton.language as tl
from gguf.quants import MXFP4

from hybrimoe_kt.kernels.blocks.fields import words_at
from hybrimoe_kt.kernels.blocks.lookup import floats, look_up, table
from hybrimoe_kt.kernels.blocks.words import dot16, words

__all__ = ["KIND", "tile", "unit"]

KIND = tl.constexpr(39)
_T0, _T1, _T2, _T3 = table(MXFP4.kvalues)  # twice the values, so that all are whole


@triton.jit
def _scale(mem, offset, block):
    """2 ** (e - 128), half of what e stands for; the two smallest have no exponent of their own in float32."""
    e = tl.load(mem + offset + block).to(tl.int32)
    return tl.where(e < 2, (e + 1) << 21, (e - 1) << 23).to(tl.float32, bitcast=True)


@triton.jit
def unit(mem, tables, o0, o1, o2, o3, row, unit, columns, x, xq, xs, xm, FORM: tl.constexpr):
    number = row * (columns // 32) + unit
    low, high = look_up(words(words_at(mem, o0), 4 * number), _T0, _T1, _T2, _T3, FORM)
    x_at = tl.broadcast_to(8 * unit, number.shape)
    total = dot16(low, words(xq, x_at), FORM) + dot16(high, words(xq, x_at + 4), FORM)
    return total.to(tl.float32) * tl.load(xs + (x_at >> 3)) * _scale(mem, o1, number)


@triton.jit
def tile(mem, tables, o0, o1, o2, o3, row, half, lane, step, columns, FORM: tl.constexpr):
    blocks = columns // 32
    number = row * blocks + tl.minimum(2 * step + half, blocks - 1)
    quants = tl.load(words_at(mem, o0) + (4 * number + tl.arange(0, 4)[None, None, :]))
    low, high = look_up(quants, _T0, _T1, _T2, _T3, FORM)
    scale = _scale(mem, o1, number)
    return floats(low, FORM) * scale, floats(high, FORM) * scale
