"""Values that are looked up: magnitudes in the tables of code words, signs in bits of their own.

Look-ups are plain loads, which hit the L1 cache. Compared in machine code: `tl.gather` saves a tenth of the integer
instructions but copies the table to shared memory and waits for all warps around each look-up; making addresses with an
OR saves a tenth on sm_90 and sm_100, next to nothing on sm_80, sm_86 and sm_120, and costs on AMD (docs/kernels.md).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .dot import dot4
from .fields import exact
from .words import pick

__all__ = ["biased", "dot16_signed", "eighth_signs", "floats16", "four_signs", "odd", "pair", "signed", "two_signs"]


@triton.jit
def pair(base, offset):
    """Load two words from each `offset`, even: one 8-byte load."""
    return tl.split(tl.load(base + (tl.expand_dims(offset, -1) + tl.arange(0, 2))))


@triton.jit
def odd(nibble, SHIFT: tl.constexpr):
    """The odd scale `2 * s + 1` of the four bits s from SHIFT on."""
    return ((nibble >> SHIFT) & 0xF) * 2 + 1


@triton.jit
def four_signs(packed):
    """Four groups of seven sign bits, the low 28 of `packed`, as four bytes of eight."""
    low, high = (packed & 0x7F) | ((packed << 1) & 0x7F00), ((packed << 2) & 0x7F0000) | ((packed << 3) & 0x7F000000)
    return eighth_signs(low | high)


@triton.jit
def two_signs(packed, half):
    """The first or second two of `four_signs`, in the low two bytes."""
    sevens = packed >> (14 * half)
    return eighth_signs((sevens & 0x7F) | ((sevens << 1) & 0x7F00))


@triton.jit
def eighth_signs(sevens):
    """Add the eighth sign to seven in each byte: it makes their number even."""
    folded = sevens ^ (sevens >> 4)
    folded ^= folded >> 2
    folded ^= folded >> 1
    return sevens | ((folded & 0x01010101) << 7)


@triton.jit
def signed(words, bits):
    """Negate those of the four int8 in `words`, none of them 0, whose bit in the low four of `bits` is set."""
    ones = ((bits & 0xF) * 0x00204081) & 0x01010101
    return (words ^ (ones * 0xFF)) + ones


@triton.jit
def dot16_signed(w0, w1, w2, w3, bits, x, FORM: tl.constexpr):
    """Dot products of 16 magnitudes, a sign bit each in the low half of `bits`, with words `x [R, V, 4]`: int32."""
    x0, x1, x2, x3 = pick(x)
    total = dot4(signed(w0, bits), x0, tl.zeros(w0.shape, tl.int32), FORM)
    total = dot4(signed(w1, bits >> 4), x1, total, FORM)
    total = dot4(signed(w2, bits >> 8), x2, total, FORM)
    return dot4(signed(w3, bits >> 12), x3, total, FORM)


@triton.jit
def biased(words, bits):
    """64 plus or minus each of the four bytes in `words`, 1 to 63, by the sign bits as in `signed`."""
    ones = ((bits & 0xF) * 0x00204081) & 0x01010101
    return ((words | 0x40404040) ^ (ones * 0x7F)) + ones


@triton.jit
def floats16(w0, w1, w2, w3, bits):
    """The 16 magnitudes of four words `[N, 2, 1]` with their signs, as in `dot16_signed`: float32 `[N, 2, 16]`."""
    first = tl.join(biased(w0, bits), biased(w2, bits >> 8))
    second = tl.join(biased(w1, bits >> 4), biased(w3, bits >> 12))
    four = tl.reshape(tl.join(first, second), [w0.shape[0], 2, 4, 1])
    return tl.reshape(exact((four >> (8 * tl.arange(0, 4))) & 0xFF, 64), [w0.shape[0], 2, 16])
