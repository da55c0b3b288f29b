"""Q5_0: planes qs (as Q4_0), qh (a word a block, bit j for value j), d. Columns are those of Q4_0."""

from __future__ import annotations

import triton
import triton.language as tl

from hybrimoe_kt.kernels.blocks.fields import bytes_at, exact, plane_scale, words_at
from hybrimoe_kt.kernels.blocks.words import dot16, words

__all__ = ["KIND", "spread", "tile", "unit"]

KIND = tl.constexpr(6)


@triton.jit
def spread(bits):
    """Move the low four bits of `bits` to bit 4 of the four bytes of a word."""
    return (((bits & 0xF) * 0x00204081) & 0x01010101) << 4


@triton.jit
def unit(mem, tables, o0, o1, o2, o3, row, unit, columns, x, xq, xs, xm, FORM: tl.constexpr):
    number = row * (columns // 32) + unit
    quants = words(words_at(mem, o0), 4 * number)
    fifth = tl.load(words_at(mem, o1) + number)[:, :, None] >> (4 * tl.arange(0, 4))[None, None, :]
    x_at = tl.broadcast_to(8 * unit, number.shape)
    low = (((quants & 0x0F0F0F0F) | spread(fifth)) + 0x70707070) ^ -0x7F7F7F80
    high = ((((quants >> 4) & 0x0F0F0F0F) | spread(fifth >> 16)) + 0x70707070) ^ -0x7F7F7F80
    total = dot16(low, words(xq, x_at), FORM) + dot16(high, words(xq, x_at + 4), FORM)
    return total.to(tl.float32) * plane_scale(mem, o2, number) * tl.load(xs + (x_at >> 3))


@triton.jit
def tile(mem, tables, o0, o1, o2, o3, row, half, lane, step, columns):
    blocks = columns // 32
    number = row * blocks + tl.minimum(2 * step + half, blocks - 1)
    quants = bytes_at(mem, o0, number * 16 + lane)
    fifth = tl.load(words_at(mem, o1) + number)
    scale = plane_scale(mem, o2, number)
    low = (quants & 0xF) | (((fifth >> lane) & 1) << 4)
    high = (quants & 0xF0) | (((fifth >> (lane + 16)) & 1) << 8)
    return exact(low, 16) * scale, exact(high, 256) * (0.0625 * scale)
