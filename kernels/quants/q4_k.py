"""Q4_K: blocks of 144 bytes: d, dmin, 12 bytes of scales, then 4 chunks of 32 bytes: 64 values, low nibbles first."""

from __future__ import annotations

import triton
import triton.language as tl

from hybrimoe_kt.kernels.blocks.fields import bytes_at, exact, words_at
from hybrimoe_kt.kernels.blocks.minima import affine, chunk_scales, scales_and_minima
from hybrimoe_kt.kernels.blocks.words import dot16, pick, words

__all__ = ["KIND", "tile", "unit"]

KIND = tl.constexpr(12)


@triton.jit
def unit(mem, tables, o0, o1, o2, o3, row, unit, columns, x, xq, xs, xm, FORM: tl.constexpr):
    base = words_at(mem, o0)
    block, chunk, half = unit >> 3, (unit >> 1) & 3, unit & 1
    start = (row * (columns // 256) + block) * 36
    d, first, second, third = pick(words(base, start))
    scale, minimum = scales_and_minima(first, second, third, chunk)
    quants = words(base, start + 4 + 8 * chunk + 4 * half)
    x_at = tl.broadcast_to(64 * block + 16 * chunk + 4 * half, start.shape)
    low = dot16(quants & 0x0F0F0F0F, words(xq, x_at), FORM)
    high = dot16((quants >> 4) & 0x0F0F0F0F, words(xq, x_at + 8), FORM)
    return affine(d, scale, minimum, low, high, xs, xm, x_at >> 3)


@triton.jit
def tile(mem, tables, o0, o1, o2, o3, row, half, lane, step, columns):
    block, chunk = step // 4, step % 4
    start = row * (columns // 256) + block
    low_scale, low_min, high_scale, high_min = chunk_scales(words_at(mem, o0), start * 36, chunk)
    quants = bytes_at(mem, o0, start * 144 + (16 + 32 * chunk) + 16 * half + lane)
    return exact(quants & 0xF, 0) * low_scale - low_min, exact(quants & 0xF0, 0) * high_scale - high_min
