"""How the fields of quantisation blocks are read."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["exact", "half", "plane_scale", "scales_and_minima", "words_at"]


@triton.jit
def words_at(base, offset):
    """`base + offset` bytes as int32 words; both are multiples of 16 bytes."""
    return tl.multiple_of((base + offset).to(tl.pointer_type(tl.int32)), 16)


@triton.jit
def half(bits):
    """Read the low 16 bits of int32 `bits` as a half: float32."""
    return (bits & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def exact(quants, ZERO: tl.constexpr):
    """Return int32 quants (0 to 2 ** 23) minus ZERO as float32, by placing them in the last bits of 2 ** 23.

    Conversions run at a quarter or an eighth of the speed of the OR and the subtraction that replace them.
    """
    return (quants | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + ZERO)


@triton.jit
def plane_scale(mem, offset, block):
    """Load the halves of a plane of scales: float32 `[R, V]`."""
    return tl.load((mem + offset).to(tl.pointer_type(tl.float16)) + block).to(tl.float32)


@triton.jit
def scales_and_minima(first, second, third, chunk):
    """Unpack the 6-bit scales and minima of sub-blocks 2 * chunk and 2 * chunk + 1 from a K-quant's 12 bytes.

    Both come as two bytes of an int32: the first sub-block's low, the second's above it.
    """
    shift = 16 * (chunk & 1)
    first, second, third = first >> shift, second >> shift, third >> shift
    late = chunk >= 2
    scale = tl.where(late, (third & 0x0F0F) | ((first >> 2) & 0x3030), first & 0x3F3F)
    minimum = tl.where(late, ((third >> 4) & 0x0F0F) | ((second >> 2) & 0x3030), second & 0x3F3F)
    return scale, minimum
