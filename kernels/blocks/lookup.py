"""Nibbles looked up in a table of 16 signed bytes by the target's byte permutation, from registers.

Compiled for sm_86, a step of decode_gate_up for IQ4_NL is 207 instructions, against 803 where selections and shifts
do it byte by byte: headroom 3.3, not 0.7; and of prefill_gate_up the tensor share is 81 %, not 34 %.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

from .dot import DP4A, PLAIN

__all__ = ["floats", "look_up", "table"]


def table(values: Sequence[int]) -> tuple[tl.constexpr, tl.constexpr, tl.constexpr, tl.constexpr]:
    """Pack 16 signed bytes into four int32 constants that compiled code sees."""
    raw = bytes(value & 0xFF for value in values)
    first, second, third, fourth = (
        tl.constexpr(int.from_bytes(raw[at : at + 4], "little", signed=True)) for at in (0, 4, 8, 12)
    )
    return first, second, third, fourth


@triton.jit
def look_up(quants, T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr, T3: tl.constexpr, FORM: tl.constexpr):
    """Return the table's bytes for the four low and the four high nibbles of int32 words `quants`, packed as they are.

    A permutation chooses from eight bytes: both halves of the table are looked up, then bit 3 of the nibble chooses.
    """
    t0, t1 = tl.full(quants.shape, T0, tl.int32), tl.full(quants.shape, T1, tl.int32)
    t2, t3 = tl.full(quants.shape, T2, tl.int32), tl.full(quants.shape, T3, tl.int32)
    if FORM == DP4A:  # four nibbles are looked up as they follow each other, then low and high ones are sorted
        place = quants & 0x77777777
        half = ((quants >> 1) & 0x44444444) | 0x32103210
        first = _of_16(t0, t1, t2, t3, place, half, FORM)
        second = _of_16(t0, t1, t2, t3, place >> 16, half >> 16, FORM)
        even, odd = tl.full(quants.shape, 0x6420, tl.int32), tl.full(quants.shape, 0x7531, tl.int32)
        return _permute(first, second, even, FORM), _permute(first, second, odd, FORM)
    elif FORM == PLAIN:
        return _plain(quants, t0, t1, t2, t3), _plain(quants >> 4, t0, t1, t2, t3)
    else:
        half = ((quants >> 1) & 0x04040404) | 0x03020100
        low = _of_16(t0, t1, t2, t3, quants & 0x07070707, half, FORM)
        half = ((quants >> 5) & 0x04040404) | 0x03020100
        return low, _of_16(t0, t1, t2, t3, (quants >> 4) & 0x07070707, half, FORM)


@triton.jit
def floats(quants, FORM: tl.constexpr):
    """Words `[N, 2, 4]` of signed bytes as float32 `[N, 2, 16]`: as `fields.exact`, each placed by a permutation."""
    biased = quants ^ -0x7F7F7F80
    first, second = _float(biased, 0, FORM), _float(biased, 1, FORM)
    third, fourth = _float(biased, 2, FORM), _float(biased, 3, FORM)
    return tl.reshape(tl.join(tl.join(first, third), tl.join(second, fourth)), [quants.shape[0], quants.shape[1], 16])


@triton.jit
def _permute(low, high, selectors, FORM: tl.constexpr):
    """Choose four of the eight bytes of `high:low`: by four nibbles (`prmt`), or by four bytes (`v_perm_b32`)."""
    if FORM == DP4A:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, selectors], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            "v_perm_b32 $0, $2, $1, $3", "=v,v,v,v", [low, high, selectors], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def _of_16(t0, t1, t2, t3, place, half, FORM: tl.constexpr):
    return _permute(_permute(t0, t1, place, FORM), _permute(t2, t3, place, FORM), half, FORM)


@triton.jit
def _plain(quants, t0, t1, t2, t3):
    found = tl.zeros(quants.shape, tl.int32)
    for byte in tl.static_range(4):
        place = (quants >> (8 * byte)) & 0xF
        word = tl.where(place < 8, tl.where(place < 4, t0, t1), tl.where(place < 12, t2, t3))
        found |= ((word >> (8 * (place & 3))) & 0xFF) << (8 * byte)
    return found


@triton.jit
def _float(words, BYTE: tl.constexpr, FORM: tl.constexpr):
    top = tl.full(words.shape, 0x4B000000, tl.int32)
    if FORM == PLAIN:
        placed = ((words >> (8 * BYTE)) & 0xFF) | top
    else:
        selectors: tl.constexpr = (0x7440 if FORM == DP4A else 0x07040400) + BYTE
        placed = _permute(words, top, tl.full(words.shape, selectors, tl.int32), FORM)
    return placed.to(tl.float32, bitcast=True) - 8388736.0
