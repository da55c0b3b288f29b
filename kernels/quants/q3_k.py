"""Q3_K: planes qs (64 bytes a block), hmask (32), scales (12 bytes: sixteen of 6 bits, less 32), d.

A block is two runs of 128 values; byte l of a run's 32 in qs holds values l, l + 32, l + 64 and l + 96, two bits each;
byte l of hmask the third bit of values l, l + 32 and so on, through both runs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybrimoe_kt.kernels.blocks.fields import bytes_at, exact, exact_signed, plane_scale, words_at
from hybrimoe_kt.kernels.blocks.words import dot16, scales_of_four, sum16, words

__all__ = ["KIND", "tile", "unit"]

KIND = tl.constexpr(11)


@triton.jit
def _part(quants, third, xq, xs, x_at, scale, PART: tl.constexpr, FORM: tl.constexpr):
    """The unit's 16 values of the run's 32 number PART, times scale, and the activations' scale."""
    activations = words(xq, x_at + 8 * PART)
    weights = ((quants >> (2 * PART)) & 0x03030303) | (((third >> PART) & 0x01010101) << 2)
    total = dot16(weights, activations, FORM) - 4 * sum16(activations, FORM)
    return exact_signed((scale - 32) * total) * xs


@triton.jit
def unit(mem, tables, o0, o1, o2, o3, row, unit, columns, x, xq, xs, xm, FORM: tl.constexpr):
    block, run, half = unit >> 2, (unit >> 1) & 1, unit & 1
    number = row * (columns // 256) + block
    quants = words(words_at(mem, o0), 16 * number + 8 * run + 4 * half)
    third = words(words_at(mem, o1), 8 * number + 4 * half) >> (4 * run)[:, :, None]
    packed = words_at(mem, o2) + 3 * number
    shift = 8 * half + 4 * run  # bytes 2 * PART + half, the run's nibble
    upper = tl.load(packed + 2) >> shift
    early = ((tl.load(packed) >> shift) & 0xF000F) | ((upper & 0x30003) << 4)
    late = ((tl.load(packed + 1) >> shift) & 0xF000F) | (((upper >> 2) & 0x30003) << 4)
    x_at = tl.broadcast_to(64 * block + 32 * run + 4 * half, number.shape)
    xs0, xs1, xs2, xs3 = scales_of_four(xs, tl.broadcast_to(8 * block + 4 * run, number.shape))
    total = _part(quants, third, xq, xs0, x_at, early & 0xFF, 0, FORM)
    total += _part(quants, third, xq, xs1, x_at, early >> 16, 1, FORM)
    total += _part(quants, third, xq, xs2, x_at, late & 0xFF, 2, FORM)
    total += _part(quants, third, xq, xs3, x_at, late >> 16, 3, FORM)
    return plane_scale(mem, o3, number) * total


@triton.jit
def tile(mem, tables, o0, o1, o2, o3, row, half, lane, step, columns):
    block, run, group = step // 4, step % 4 // 2, step % 2
    number = row * (columns // 256) + block
    quants = bytes_at(mem, o0, 64 * number + 32 * run + 16 * half + lane) >> (4 * group)
    third = bytes_at(mem, o1, 32 * number + 16 * half + lane) >> (2 * (step % 4))
    packed = words_at(mem, o2) + 3 * number
    lower = tl.load(packed + group) >> (8 * half + 4 * run)
    upper = tl.load(packed + 2) >> (8 * half + 2 * (step % 4))
    scales = (lower & 0xF000F) | ((upper & 0x30003) << 4)
    delta = plane_scale(mem, o3, number)
    low_scale, high_scale = delta * exact(scales & 0xFF, 32), 0.25 * delta * exact(scales >> 16, 32)
    low = (quants & 3) | ((third & 1) << 2)
    high = (quants & 0xC) | ((third & 2) << 3)
    return exact(low, 4) * low_scale, exact(high, 16) * high_scale
