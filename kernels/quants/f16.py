"""F16: eight 16-bit floats a unit, times float activations; BF16 is read by the same functions."""

from __future__ import annotations

import triton
import triton.language as tl

from hybrimoe_kt.kernels.blocks.fields import half as half_of
from hybrimoe_kt.kernels.blocks.fields import words_at
from hybrimoe_kt.kernels.blocks.words import pick, words

__all__ = ["KIND", "tile", "tile_of", "unit", "unit_of"]

KIND = tl.constexpr(1)


@triton.jit
def _pair_dot(word, x_even, x_odd, BFLOAT: tl.constexpr):
    """Dot product of the two 16-bit floats of `word` with two activations; bfloat16 is a float32's upper half."""
    if BFLOAT:
        even, odd = (word << 16).to(tl.float32, bitcast=True), (word & -0x10000).to(tl.float32, bitcast=True)
    else:
        even, odd = half_of(word), half_of(word >> 16)
    return even * x_even + odd * x_odd


@triton.jit
def unit_of(mem, o0, row, unit, columns, x, BFLOAT: tl.constexpr):
    w0, w1, w2, w3 = pick(words(words_at(mem, o0), (row * (columns // 8) + unit) * 4))
    x_at = tl.broadcast_to(8 * unit, w0.shape)
    x0, x1, x2, x3 = pick(words(x, x_at).to(tl.float32))
    x4, x5, x6, x7 = pick(words(x, x_at + 4).to(tl.float32))
    first = _pair_dot(w0, x0, x1, BFLOAT) + _pair_dot(w1, x2, x3, BFLOAT)
    return first + _pair_dot(w2, x4, x5, BFLOAT) + _pair_dot(w3, x6, x7, BFLOAT)


@triton.jit
def tile_of(mem, o0, row, half, lane, step, columns, BFLOAT: tl.constexpr):
    base = tl.multiple_of((mem + o0).to(tl.pointer_type(tl.int16)), 16)
    eights = columns // 8
    column = 64 * step + 16 * half + lane
    low = tl.load(base + row * eights * 8 + column, mask=column < eights * 8, other=0)
    high = tl.load(base + row * eights * 8 + column + 32, mask=column + 32 < eights * 8, other=0)
    if BFLOAT:
        low_values = (low.to(tl.int32) << 16).to(tl.float32, bitcast=True)
        return low_values, (high.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return low.to(tl.float16, bitcast=True).to(tl.float32), high.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def unit(mem, tables, o0, o1, o2, o3, row, unit, columns, x, xq, xs, xm, FORM: tl.constexpr):
    return unit_of(mem, o0, row, unit, columns, x, False)


@triton.jit
def tile(mem, tables, o0, o1, o2, o3, row, half, lane, step, columns):
    return tile_of(mem, o0, row, half, lane, step, columns, False)
