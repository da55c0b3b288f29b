"""What Q4_K and Q5_K share: 12 bytes of 6-bit scales and minima behind two halves, and the sums made of them."""

from __future__ import annotations

import triton
import triton.language as tl

from .fields import exact, half

__all__ = ["affine", "chunk_scales", "scales_and_minima"]


@triton.jit
def scales_and_minima(first, second, third, chunk):
    """Unpack the scales and minima of sub-blocks 2 * chunk and 2 * chunk + 1 from a block's 12 bytes.

    Both come as two bytes of an int32: the first sub-block's low, the second's above it.
    """
    shift = 16 * (chunk & 1)
    first, second, third = first >> shift, second >> shift, third >> shift
    late = chunk >= 2
    scale = tl.where(late, (third & 0x0F0F) | ((first >> 2) & 0x3030), first & 0x3F3F)
    minimum = tl.where(late, ((third >> 4) & 0x0F0F) | ((second >> 2) & 0x3030), second & 0x3F3F)
    return scale, minimum


@triton.jit
def affine(d, scale, minimum, low, high, xs, xm, at):
    """Combine a unit's dot products; `at` is the first of its two activation blocks.

    Two units share each block, so each subtracts half of the minimum's part.
    """
    xs_low = tl.load(xs + at)
    xs_high = tl.load(xs + at + 1)
    xm_low = tl.load(xm + at)
    xm_high = tl.load(xm + at + 1)
    low_sum = (low * (scale & 0xFF)).to(tl.float32) * xs_low
    high_sum = (high * (scale >> 8)).to(tl.float32) * xs_high
    offsets = exact(minimum & 0xFF, 0) * xm_low + exact(minimum >> 8, 0) * xm_high
    return half(d) * (low_sum + high_sum) - 0.5 * half(d >> 16) * offsets


@triton.jit
def chunk_scales(base, start, chunk):
    """Read a block's header: scales and minima of the chunk's two sub-blocks, float32 of `start`'s shape.

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
