"""Q5_K: blocks of 176 bytes: as Q4_K, with 32 bytes of fifth bits before the quants: bit i for the i-th 32 values."""

from __future__ import annotations

import triton
import triton.language as tl

from hybrimoe_kt.kernels.blocks.fields import bytes_at, exact, words_at
from hybrimoe_kt.kernels.blocks.minima import affine, chunk_scales, scales_and_minima
from hybrimoe_kt.kernels.blocks.words import dot16, pick, words

__all__ = ["KIND", "tile", "unit"]

KIND = tl.constexpr(13)


@triton.jit
def unit(mem, tables, o0, o1, o2, o3, row, unit, columns, x, xq, xs, xm, FORM: tl.constexpr):
    base = words_at(mem, o0)
    block, chunk, half = unit >> 3, (unit >> 1) & 3, unit & 1
    start = (row * (columns // 256) + block) * 44
    d, first, second, third = pick(words(base, start))
    scale, minimum = scales_and_minima(first, second, third, chunk)
    fifth = words(base, start + 4 + 4 * half) >> (2 * chunk)[:, :, None]
    quants = words(base, start + 12 + 8 * chunk + 4 * half)
    x_at = tl.broadcast_to(64 * block + 16 * chunk + 4 * half, start.shape)
    low = dot16((quants & 0x0F0F0F0F) | ((fifth & 0x01010101) << 4), words(xq, x_at), FORM)
    high = dot16(((quants >> 4) & 0x0F0F0F0F) | ((fifth & 0x02020202) << 3), words(xq, x_at + 8), FORM)
    return affine(d, scale, minimum, low, high, xs, xm, x_at >> 3)


@triton.jit
def tile(mem, tables, o0, o1, o2, o3, row, half, lane, step, columns):
    block, chunk = step // 4, step % 4
    start = row * (columns // 256) + block
    low_scale, low_min, high_scale, high_min = chunk_scales(words_at(mem, o0), start * 44, chunk)
    fifth = bytes_at(mem, o0, start * 176 + 16 + 16 * half + lane) >> (2 * chunk)
    quants = bytes_at(mem, o0, start * 176 + (48 + 32 * chunk) + 16 * half + lane)
    low, high = (quants & 0xF) | ((fifth & 1) << 4), (quants & 0xF0) | ((fifth & 2) << 7)
    return exact(low, 0) * low_scale - low_min, exact(high, 0) * high_scale - high_min
