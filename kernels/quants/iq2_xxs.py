"""IQ2_XXS: planes qs (8 bytes for 32 values: 4 code words of eight values, 4 x 7 signs, a scale), d."""

from __future__ import annotations

import triton
import triton.language as tl

from hybrimoe_kt.kernels.blocks.code_words import dot16_signed, floats16, four_signs, odd, pair, two_signs
from hybrimoe_kt.kernels.blocks.fields import exact, plane_scale, words_at
from hybrimoe_kt.kernels.blocks.words import words
from hybrimoe_kt.kernels.tables import OFFSETS

__all__ = ["KIND", "tile", "unit"]

KIND = tl.constexpr(16)
GRID = tl.constexpr(OFFSETS["IQ2_XXS"])


@triton.jit
def _four(tables, places):
    """Look up the code words of the low two bytes of `places`, two words each."""
    w0, w1 = pair(words_at(tables, GRID), 2 * (places & 0xFF))
    w2, w3 = pair(words_at(tables, GRID), 2 * ((places >> 8) & 0xFF))
    return w0, w1, w2, w3


@triton.jit
def unit(mem, tables, o0, o1, o2, o3, row, unit, columns, x, xq, xs, xm, FORM: tl.constexpr):
    number = row * (columns // 32) + unit
    places, packed = pair(words_at(mem, o0), 2 * number)
    signs = four_signs(packed)
    x_at = tl.broadcast_to(8 * unit, number.shape)
    w0, w1, w2, w3 = _four(tables, places)
    w4, w5, w6, w7 = _four(tables, places >> 16)
    total = dot16_signed(w0, w1, w2, w3, signs, words(xq, x_at), FORM)
    total += dot16_signed(w4, w5, w6, w7, signs >> 16, words(xq, x_at + 4), FORM)
    scaled = (total * odd(packed, 28)).to(tl.float32) * (0.125 * plane_scale(mem, o1, number >> 3))
    return scaled * tl.load(xs + (x_at >> 3))


@triton.jit
def tile(mem, tables, o0, o1, o2, o3, row, half, lane, step, columns):
    block, sub = row * (columns // 256) + step // 4, 2 * (step % 4)
    return _tile32(mem, tables, o0, o1, block, sub, half), _tile32(mem, tables, o0, o1, block, sub + 1, half)


@triton.jit
def _tile32(mem, tables, o0, o1, block, sub, half):
    places, packed = pair(words_at(mem, o0), 16 * block + 2 * sub)
    w0, w1, w2, w3 = _four(tables, places >> (16 * half))
    scale = exact(odd(packed, 28), 0) * (0.125 * plane_scale(mem, o1, block))
    return floats16(w0, w1, w2, w3, two_signs(packed, half)) * scale
