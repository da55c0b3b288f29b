"""Q2_K: planes qs (64 bytes a block, as Q3_K), scales (16 bytes: a scale and above it a minimum, of 16 values each),
dm (a word: what every scale is times, above it what every minimum is).

Decode needs sums of 16 activations and has those of 32. They are one more dot product, with ones, which gate and up
share: 48 where 32 do the rest, and headroom on sm_86 is 3.4. Sums of 16 from `quantize_rows` would be four narrow
loads instead, but more memory and another result of a kernel that serves every type.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybrimoe_kt.kernels.blocks.fields import bytes_at, exact, exact_signed, words_at
from hybrimoe_kt.kernels.blocks.fields import half as half_of
from hybrimoe_kt.kernels.blocks.words import dot16, scales_of_four, sum16, words

__all__ = ["KIND", "tile", "unit"]

KIND = tl.constexpr(10)


@triton.jit
def _part(quants, xq, xs, x_at, scales, PART: tl.constexpr, FORM: tl.constexpr):
    """The unit's 16 values of the run's 32 number PART: dot product times scale, and activations times minimum."""
    activations = words(xq, x_at + 8 * PART)
    total = dot16((quants >> (2 * PART)) & 0x03030303, activations, FORM) * (scales & 0xF)
    part = sum16(activations, FORM) * ((scales >> 4) & 0xF)
    return exact_signed(total) * xs, exact_signed(part) * xs


@triton.jit
def unit(mem, tables, o0, o1, o2, o3, row, unit, columns, x, xq, xs, xm, FORM: tl.constexpr):
    block, run, half = unit >> 2, (unit >> 1) & 1, unit & 1
    number = row * (columns // 256) + block
    quants = words(words_at(mem, o0), 16 * number + 8 * run + 4 * half)
    packed = words_at(mem, o1) + 4 * number + 2 * run
    early, late = tl.load(packed) >> (8 * half), tl.load(packed + 1) >> (8 * half)
    dm = tl.load(words_at(mem, o2) + number)
    x_at = tl.broadcast_to(64 * block + 32 * run + 4 * half, number.shape)
    xs0, xs1, xs2, xs3 = scales_of_four(xs, tl.broadcast_to(8 * block + 4 * run, number.shape))
    t0, m0 = _part(quants, xq, xs0, x_at, early, 0, FORM)
    t1, m1 = _part(quants, xq, xs1, x_at, early >> 16, 1, FORM)
    t2, m2 = _part(quants, xq, xs2, x_at, late, 2, FORM)
    t3, m3 = _part(quants, xq, xs3, x_at, late >> 16, 3, FORM)
    return half_of(dm) * (t0 + t1 + t2 + t3) - half_of(dm >> 16) * (m0 + m1 + m2 + m3)


@triton.jit
def tile(mem, tables, o0, o1, o2, o3, row, half, lane, step, columns):
    block, run, group = step // 4, step % 4 // 2, step % 2
    number = row * (columns // 256) + block
    quants = bytes_at(mem, o0, 64 * number + 32 * run + 16 * half + lane) >> (4 * group)
    scales = tl.load(words_at(mem, o1) + 4 * number + (2 * run + group)) >> (8 * half)
    dm = tl.load(words_at(mem, o2) + number)
    delta, delta_min = half_of(dm), half_of(dm >> 16)
    low_scale, low_min = delta * exact(scales & 0xF, 0), delta_min * exact((scales >> 4) & 0xF, 0)
    scales = scales >> 16
    high_scale, high_min = delta * exact(scales & 0xF, 0), delta_min * exact((scales >> 4) & 0xF, 0)
    return exact(quants & 3, 0) * low_scale - low_min, exact(quants & 0xC, 0) * (0.25 * high_scale) - high_min
