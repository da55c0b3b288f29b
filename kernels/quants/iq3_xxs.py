"""IQ3_XXS: planes qs (64 code words of four values), signs (a word for 32 values: 4 x 7 signs, a scale), d."""

from __future__ import annotations

import triton
import triton.language as tl

from hybrimoe_kt.kernels.blocks.code_words import dot16_signed, floats16, four_signs, odd, pair, two_signs
from hybrimoe_kt.kernels.blocks.fields import exact, plane_scale, words_at
from hybrimoe_kt.kernels.blocks.words import words
from hybrimoe_kt.kernels.tables import OFFSETS

__all__ = ["KIND", "tile", "unit"]

KIND = tl.constexpr(18)
GRID = tl.constexpr(OFFSETS["IQ3_XXS"])


@triton.jit
def _four(tables, places):
    grid = words_at(tables, GRID)
    first, second = tl.load(grid + (places & 0xFF)), tl.load(grid + ((places >> 8) & 0xFF))
    return first, second, tl.load(grid + ((places >> 16) & 0xFF)), tl.load(grid + ((places >> 24) & 0xFF))


@triton.jit
def unit(mem, tables, o0, o1, o2, o3, row, unit, columns, x, xq, xs, xm, FORM: tl.constexpr):
    number = row * (columns // 32) + unit
    packed = tl.load(words_at(mem, o1) + number)
    signs = four_signs(packed)
    first, second = pair(words_at(mem, o0), 2 * number)
    x_at = tl.broadcast_to(8 * unit, number.shape)
    w0, w1, w2, w3 = _four(tables, first)
    w4, w5, w6, w7 = _four(tables, second)
    total = dot16_signed(w0, w1, w2, w3, signs, words(xq, x_at), FORM)
    total += dot16_signed(w4, w5, w6, w7, signs >> 16, words(xq, x_at + 4), FORM)
    scaled = (total * odd(packed, 28)).to(tl.float32) * (0.25 * plane_scale(mem, o2, number >> 3))
    return scaled * tl.load(xs + (x_at >> 3))


@triton.jit
def tile(mem, tables, o0, o1, o2, o3, row, half, lane, step, columns):
    block, sub = row * (columns // 256) + step // 4, 2 * (step % 4)
    return _tile32(mem, tables, o0, o1, o2, block, sub, half), _tile32(mem, tables, o0, o1, o2, block, sub + 1, half)


@triton.jit
def _tile32(mem, tables, o0, o1, o2, block, sub, half):
    packed = tl.load(words_at(mem, o1) + (8 * block + sub))
    w0, w1, w2, w3 = _four(tables, tl.load(words_at(mem, o0) + (16 * block + 2 * sub + half)))
    scale = exact(odd(packed, 28), 0) * (0.25 * plane_scale(mem, o2, block))
    return floats16(w0, w1, w2, w3, two_signs(packed, half)) * scale
