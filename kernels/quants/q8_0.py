"""Q8_0: planes qs (32 int8 a block), d. Two units a block."""

from __future__ import annotations

import triton
import triton.language as tl

from hybrimoe_kt.kernels.blocks.fields import bytes_at, exact, plane_scale, words_at
from hybrimoe_kt.kernels.blocks.words import dot16, words

__all__ = ["KIND", "tile", "unit"]

KIND = tl.constexpr(8)


@triton.jit
def unit(mem, tables, o0, o1, o2, o3, row, unit, columns, x, xq, xs, xm, FORM: tl.constexpr):
    number = row * (columns // 32) + (unit >> 1)
    quants = words(words_at(mem, o0), 8 * number + 4 * (unit & 1))
    x_at = tl.broadcast_to(4 * unit, number.shape)
    total = dot16(quants, words(xq, x_at), FORM).to(tl.float32)
    return total * plane_scale(mem, o1, number) * tl.load(xs + (x_at >> 3))


@triton.jit
def tile(mem, tables, o0, o1, o2, o3, row, half, lane, step, columns):
    blocks = columns // 32
    second = tl.minimum(2 * step + 1, blocks - 1)  # past the row's end the caller's activations are zero
    low_block, high_block = row * blocks + 2 * step, row * blocks + second
    low = exact(bytes_at(mem, o0, low_block * 32 + 16 * half + lane) ^ 0x80, 128)
    high = exact(bytes_at(mem, o0, high_block * 32 + 16 * half + lane) ^ 0x80, 128)
    return low * plane_scale(mem, o1, low_block), high * plane_scale(mem, o1, high_block)
