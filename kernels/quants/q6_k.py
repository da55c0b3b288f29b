"""Q6_K: planes ql (128 bytes a block), qh (64), scales (16 int8), d.

A block is two runs of 128 values; byte l of a run's 64 in ql holds value l and, above it, value l + 64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybrimoe_kt.kernels.blocks.fields import bytes_at, exact, plane_scale, words_at
from hybrimoe_kt.kernels.blocks.words import dot16, words

__all__ = ["KIND", "columns", "tile", "unit"]

KIND = tl.constexpr(14)


@triton.jit
def unit(mem, tables, o0, o1, o2, o3, row, unit, columns, x, xq, xs, xm, FORM: tl.constexpr):
    block, run, group, half = unit >> 3, (unit >> 2) & 1, (unit >> 1) & 1, unit & 1
    number = row * (columns // 256) + block
    low_bits = words(words_at(mem, o0), 32 * number + 4 * (unit & 7))
    high_bits = words(words_at(mem, o1), 16 * number + 8 * run + 4 * half) >> (2 * group)[:, :, None]
    low = (low_bits & 0x0F0F0F0F) | ((high_bits & 0x03030303) << 4)
    high = ((low_bits >> 4) & 0x0F0F0F0F) | (high_bits & 0x30303030)
    x_at = tl.broadcast_to(64 * block + 32 * run + 8 * group + 4 * half, number.shape)
    low_sum = dot16((low + 0x60606060) ^ -0x7F7F7F80, words(xq, x_at), FORM)
    high_sum = dot16((high + 0x60606060) ^ -0x7F7F7F80, words(xq, x_at + 16), FORM)
    scales = (mem + o2).to(tl.pointer_type(tl.int8)) + 16 * number + 8 * run + 2 * group + half
    low_sum *= tl.load(scales).to(tl.int32)
    high_sum *= tl.load(scales + 4).to(tl.int32)
    low_part = low_sum.to(tl.float32) * tl.load(xs + (x_at >> 3))
    high_part = high_sum.to(tl.float32) * tl.load(xs + (x_at >> 3) + 2)
    return plane_scale(mem, o3, number) * (low_part + high_part)


@triton.jit
def columns(step, lane):
    low = 128 * (step // 2) + 32 * (step % 2) + lane
    return low, low + 64


@triton.jit
def tile(mem, tables, o0, o1, o2, o3, row, half, lane, step, columns):
    block, run, group = step // 4, step % 4 // 2, step % 2
    number = row * (columns // 256) + block
    low_bits = bytes_at(mem, o0, 128 * number + (64 * run + 32 * group) + 16 * half + lane)
    high_bits = bytes_at(mem, o1, 64 * number + 32 * run + 16 * half + lane) >> (2 * group)
    scales = mem + o2 + 16 * number + (8 * run + 2 * group) + half
    delta = plane_scale(mem, o3, number)
    low_scale = delta * exact(tl.load(scales).to(tl.int32) ^ 0x80, 128)
    high_scale = 0.0625 * delta * exact(tl.load(scales + 4).to(tl.int32) ^ 0x80, 128)
    low = (low_bits & 0xF) | ((high_bits & 0x03) << 4)
    high = (low_bits & 0xF0) | ((high_bits & 0x30) << 4)
    return exact(low, 32) * low_scale, exact(high, 512) * high_scale
