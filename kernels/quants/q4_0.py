"""Q4_0: planes qs (16 bytes a block: 16 low nibbles, then 16 high), d."""

from __future__ import annotations

import triton
import triton.language as tl

from hybrimoe_kt.kernels.blocks.fields import bytes_at, exact, plane_scale, words_at
from hybrimoe_kt.kernels.blocks.words import dot16, words

__all__ = ["KIND", "columns", "tile", "unit"]

KIND = tl.constexpr(2)


@triton.jit
def unit(mem, tables, o0, o1, o2, o3, row, unit, columns, x, xq, xs, xm, FORM: tl.constexpr):
    number = row * (columns // 32) + unit
    quants = words(words_at(mem, o0), 4 * number)
    x_at = tl.broadcast_to(8 * unit, number.shape)
    low = ((quants & 0x0F0F0F0F) + 0x78787878) ^ -0x7F7F7F80
    high = (((quants >> 4) & 0x0F0F0F0F) + 0x78787878) ^ -0x7F7F7F80
    total = dot16(low, words(xq, x_at), FORM) + dot16(high, words(xq, x_at + 4), FORM)
    return total.to(tl.float32) * plane_scale(mem, o1, number) * tl.load(xs + (x_at >> 3))


@triton.jit
def columns(step, lane):
    low = 64 * step + 32 * (lane // 16) + lane % 16
    return low, low + 16


@triton.jit
def tile(mem, tables, o0, o1, o2, o3, row, half, lane, step, columns):
    blocks = columns // 32
    number = row * blocks + tl.minimum(2 * step + half, blocks - 1)
    quants = bytes_at(mem, o0, number * 16 + lane)
    scale = plane_scale(mem, o1, number)
    return exact(quants & 0xF, 8) * scale, exact(quants & 0xF0, 128) * (0.0625 * scale)
