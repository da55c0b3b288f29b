"""What matrix-matrix kernels do with a step of 64 columns, one format after the other.

A step is two tiles of 32 columns, "low" and "high": for 4 to 6 bits the values in the low and the high nibbles of the
same 32 bytes, so that neither tile waits for a shuffle. High nibbles stay where they are, 16 times as large, and
their scales are a sixteenth: exact, and a shift less. Which columns they are, `step_columns` says. Tiles are
float32 `[N, 32]`, dequantised in registers; the caller rounds them to what its tensor cores take.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .fields import exact, half, plane_scale, scales_and_minima, words_at
from .kinds import BF16, F16, Q4_0, Q4_K, Q5_0, Q5_K, Q6_K, Q8_0


@triton.jit
def step_columns(KIND: tl.constexpr, step):
    """Columns of the low and the high tile of `step`: int32 `[32]` each."""
    lane = tl.arange(0, 32)
    if KIND == Q4_0 or KIND == Q5_0:
        low = 64 * step + 32 * (lane // 16) + lane % 16
        return low, low + 16
    elif KIND == Q6_K:
        low = 128 * (step // 2) + 32 * (step % 2) + lane
        return low, low + 64
    else:
        low = 64 * step + lane
        return low, low + 32


@triton.jit
def _bytes(mem, offset, at):
    """Load bytes `at [N, 2, 16]` of a plane as int32; runs of 16 are aligned."""
    return tl.load(tl.multiple_of(mem + offset, 16) + at).to(tl.int32)


@triton.jit
def _flat(tile):
    """`[N, 2, 16]` as `[N, 32]`."""
    return tl.reshape(tile, [tile.shape[0], 32])


@triton.jit
def _k_scales(base, start, chunk):
    """Read a Q4_K or Q5_K header: scales and minima of the chunk's two sub-blocks, float32 of `start`'s shape.

    The second scale is a sixteenth.
    """
    d = tl.load(base + start)
    first, second, third = tl.load(base + start + 1), tl.load(base + start + 2), tl.load(base + start + 3)
    scale, minimum = scales_and_minima(first, second, third, chunk)
    delta, delta_min = half(d), half(d >> 16)
    return (
        delta * exact(scale & 0xFF, 0),
        delta_min * exact(minimum & 0xFF, 0),
        0.0625 * delta * exact(scale >> 8, 0),
        delta_min * exact(minimum >> 8, 0),
    )


@triton.jit
def _q4_k(mem, o0, row, half, lane, step, columns):
    block, chunk = step // 4, step % 4
    start = row * (columns // 256) + block
    low_scale, low_min, high_scale, high_min = _k_scales(words_at(mem, o0), start * 36, chunk)
    quants = _bytes(mem, o0, start * 144 + (16 + 32 * chunk) + 16 * half + lane)
    return exact(quants & 0xF, 0) * low_scale - low_min, exact(quants & 0xF0, 0) * high_scale - high_min


@triton.jit
def _q5_k(mem, o0, row, half, lane, step, columns):
    block, chunk = step // 4, step % 4
    start = row * (columns // 256) + block
    low_scale, low_min, high_scale, high_min = _k_scales(words_at(mem, o0), start * 44, chunk)
    fifth = _bytes(mem, o0, start * 176 + 16 + 16 * half + lane) >> (2 * chunk)
    quants = _bytes(mem, o0, start * 176 + (48 + 32 * chunk) + 16 * half + lane)
    low, high = (quants & 0xF) | ((fifth & 1) << 4), (quants & 0xF0) | ((fifth & 2) << 7)
    return exact(low, 0) * low_scale - low_min, exact(high, 0) * high_scale - high_min


@triton.jit
def _q6_k(mem, o0, o1, o2, o3, row, half, lane, step, columns):
    block, run, group = step // 4, step % 4 // 2, step % 2
    number = row * (columns // 256) + block
    low_bits = _bytes(mem, o0, 128 * number + (64 * run + 32 * group) + 16 * half + lane)
    high_bits = _bytes(mem, o1, 64 * number + 32 * run + 16 * half + lane) >> (2 * group)
    scales = mem + o2 + 16 * number + (8 * run + 2 * group) + half
    delta = plane_scale(mem, o3, number)
    low_scale = delta * exact(tl.load(scales).to(tl.int32) ^ 0x80, 128)
    high_scale = 0.0625 * delta * exact(tl.load(scales + 4).to(tl.int32) ^ 0x80, 128)
    low = (low_bits & 0xF) | ((high_bits & 0x03) << 4)
    high = (low_bits & 0xF0) | ((high_bits & 0x30) << 4)
    return exact(low, 32) * low_scale, exact(high, 512) * high_scale


@triton.jit
def _q8_0(mem, o0, o1, row, half, lane, step, columns):
    blocks = columns // 32
    second = tl.minimum(2 * step + 1, blocks - 1)  # past the row's end the caller's activations are zero
    low_block, high_block = row * blocks + 2 * step, row * blocks + second
    low = exact(_bytes(mem, o0, low_block * 32 + 16 * half + lane) ^ 0x80, 128)
    high = exact(_bytes(mem, o0, high_block * 32 + 16 * half + lane) ^ 0x80, 128)
    return low * plane_scale(mem, o1, low_block), high * plane_scale(mem, o1, high_block)


@triton.jit
def _q4_0(mem, o0, o1, row, half, lane, step, columns):
    blocks = columns // 32
    number = row * blocks + tl.minimum(2 * step + half, blocks - 1)
    quants = _bytes(mem, o0, number * 16 + lane)
    scale = plane_scale(mem, o1, number)
    return exact(quants & 0xF, 8) * scale, exact(quants & 0xF0, 128) * (0.0625 * scale)


@triton.jit
def _q5_0(mem, o0, o1, o2, row, half, lane, step, columns):
    blocks = columns // 32
    number = row * blocks + tl.minimum(2 * step + half, blocks - 1)
    quants = _bytes(mem, o0, number * 16 + lane)
    fifth = tl.load(words_at(mem, o1) + number)
    scale = plane_scale(mem, o2, number)
    low = (quants & 0xF) | (((fifth >> lane) & 1) << 4)
    high = (quants & 0xF0) | (((fifth >> (lane + 16)) & 1) << 8)
    return exact(low, 16) * scale, exact(high, 256) * (0.0625 * scale)


@triton.jit
def _halves(mem, o0, row, half, lane, step, columns, KIND: tl.constexpr):
    base = tl.multiple_of((mem + o0).to(tl.pointer_type(tl.int16)), 16)
    eights = columns // 8
    column = 64 * step + 16 * half + lane
    low = tl.load(base + row * eights * 8 + column, mask=column < eights * 8, other=0)
    high = tl.load(base + row * eights * 8 + column + 32, mask=column + 32 < eights * 8, other=0)
    if KIND == BF16:
        low_values = (low.to(tl.int32) << 16).to(tl.float32, bitcast=True)
        return low_values, (high.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return low.to(tl.float16, bitcast=True).to(tl.float32), high.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def step_tiles(KIND: tl.constexpr, mem, o0, o1, o2, o3, row, step, columns):
    """Dequantise one step of rows `row [N]`: the low and the high tile, float32 `[N, 32]` each.

    `mem` points to the slot, `o0` to `o3` are the byte offsets of the matrix's planes in it.
    """
    row = row[:, None, None]
    half = tl.arange(0, 2)[None, :, None]
    lane = tl.arange(0, 16)[None, None, :]
    if KIND == Q4_K:
        low, high = _q4_k(mem, o0, row, half, lane, step, columns)
    elif KIND == Q5_K:
        low, high = _q5_k(mem, o0, row, half, lane, step, columns)
    elif KIND == Q6_K:
        low, high = _q6_k(mem, o0, o1, o2, o3, row, half, lane, step, columns)
    elif KIND == Q8_0:
        low, high = _q8_0(mem, o0, o1, row, half, lane, step, columns)
    elif KIND == Q4_0:
        low, high = _q4_0(mem, o0, o1, row, half, lane, step, columns)
    elif KIND == Q5_0:
        low, high = _q5_0(mem, o0, o1, o2, row, half, lane, step, columns)
    else:
        tl.static_assert(KIND == F16 or KIND == BF16, "no kernel reads this type")
        low, high = _halves(mem, o0, row, half, lane, step, columns, KIND)
    return _flat(low), _flat(high)
