"""IQ4_XS: planes qs (16 bytes for 32 values, as IQ4_NL), head (8 bytes a block: d, then eight scales of 6 bits).

Above d are the scales' upper two bits, in the second word their lower four. Columns are those of Q4_0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybrimoe_kt.kernels.blocks.fields import exact, words_at
from hybrimoe_kt.kernels.blocks.fields import half as half_of
from hybrimoe_kt.kernels.blocks.lookup import floats, look_up
from hybrimoe_kt.kernels.blocks.words import dot16, words

from .iq4_nl import T0, T1, T2, T3

__all__ = ["KIND", "tile", "unit"]

KIND = tl.constexpr(23)


@triton.jit
def _scale(mem, offset, block, place):
    """The scale of a block and the whole number, plus 32, that multiplies it in its `place`th 32 values."""
    head = words_at(mem, offset) + 2 * block
    first, second = tl.load(head), tl.load(head + 1)
    return half_of(first), ((second >> (4 * place)) & 0xF) | (((first >> (16 + 2 * place)) & 3) << 4)


@triton.jit
def unit(mem, tables, o0, o1, o2, o3, row, unit, columns, x, xq, xs, xm, FORM: tl.constexpr):
    block = row * (columns // 256) + (unit >> 3)
    low, high = look_up(words(words_at(mem, o0), 32 * block + 4 * (unit & 7)), T0, T1, T2, T3, FORM)
    d, scale = _scale(mem, o1, block, unit & 7)
    x_at = tl.broadcast_to(8 * unit, block.shape)
    total = dot16(low, words(xq, x_at), FORM) + dot16(high, words(xq, x_at + 4), FORM)
    return (total * (scale - 32)).to(tl.float32) * d * tl.load(xs + (x_at >> 3))


@triton.jit
def tile(mem, tables, o0, o1, o2, o3, row, half, lane, step, columns, FORM: tl.constexpr):
    block, place = row * (columns // 256) + step // 4, 2 * (step % 4) + half
    quants = tl.load(words_at(mem, o0) + (32 * block + 4 * place + tl.arange(0, 4)[None, None, :]))
    low, high = look_up(quants, T0, T1, T2, T3, FORM)
    d, scale = _scale(mem, o1, block, place)
    delta = d * exact(scale, 32)
    return floats(low, FORM) * delta, floats(high, FORM) * delta
