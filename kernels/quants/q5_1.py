"""Q5_1: planes qs and qh (as Q5_0), dm (as Q4_1). Columns are those of Q4_0."""

from __future__ import annotations

import triton
import triton.language as tl

from hybrimoe_kt.kernels.blocks.fields import bytes_at, exact, words_at
from hybrimoe_kt.kernels.blocks.fields import half as half_of
from hybrimoe_kt.kernels.blocks.words import dot16, words

from .q5_0 import spread

__all__ = ["KIND", "tile", "unit"]

KIND = tl.constexpr(7)


@triton.jit
def unit(mem, tables, o0, o1, o2, o3, row, unit, columns, x, xq, xs, xm, FORM: tl.constexpr):
    number = row * (columns // 32) + unit
    quants = words(words_at(mem, o0), 4 * number)
    fifth = tl.load(words_at(mem, o1) + number)[:, :, None] >> (4 * tl.arange(0, 4))[None, None, :]
    dm = tl.load(words_at(mem, o2) + number)
    x_at = tl.broadcast_to(8 * unit, number.shape)
    total = dot16((quants & 0x0F0F0F0F) | spread(fifth), words(xq, x_at), FORM)
    total += dot16(((quants >> 4) & 0x0F0F0F0F) | spread(fifth >> 16), words(xq, x_at + 4), FORM)
    scaled = total.to(tl.float32) * tl.load(xs + (x_at >> 3))
    return half_of(dm) * scaled + half_of(dm >> 16) * tl.load(xm + (x_at >> 3))


@triton.jit
def tile(mem, tables, o0, o1, o2, o3, row, half, lane, step, columns):
    blocks = columns // 32
    number = row * blocks + tl.minimum(2 * step + half, blocks - 1)
    quants = bytes_at(mem, o0, number * 16 + lane)
    fifth = tl.load(words_at(mem, o1) + number)
    dm = tl.load(words_at(mem, o2) + number)
    scale, offset = half_of(dm), half_of(dm >> 16)
    low = (quants & 0xF) | (((fifth >> lane) & 1) << 4)
    high = (quants & 0xF0) | (((fifth >> (lane + 16)) & 1) << 8)
    return exact(low, 0) * scale + offset, exact(high, 0) * (0.0625 * scale) + offset
