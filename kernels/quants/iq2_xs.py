"""IQ2_XS: planes qs (32 halfwords: 9 bits a code word of eight values, 7 signs), scales (4 bits for 16 values), d."""

from __future__ import annotations

import triton
import triton.language as tl

from hybrimoe_kt.kernels.blocks.code_words import dot16_signed, eighth_signs, floats16, odd, pair
from hybrimoe_kt.kernels.blocks.fields import exact, plane_scale, words_at
from hybrimoe_kt.kernels.blocks.words import words
from hybrimoe_kt.kernels.tables import OFFSETS

__all__ = ["KIND", "tile", "unit"]

KIND = tl.constexpr(17)
GRID = tl.constexpr(OFFSETS["IQ2_XS"])


@triton.jit
def _four(tables, codes):
    """Look up the code words of two halfwords, two words each."""
    w0, w1 = pair(words_at(tables, GRID), 2 * (codes & 0x1FF))
    w2, w3 = pair(words_at(tables, GRID), 2 * ((codes >> 16) & 0x1FF))
    return w0, w1, w2, w3


@triton.jit
def _sevens(codes):
    """The seven sign bits of each halfword, in the low two bytes."""
    return ((codes >> 9) & 0x7F) | ((codes >> 17) & 0x7F00)


@triton.jit
def unit(mem, tables, o0, o1, o2, o3, row, unit, columns, x, xq, xs, xm, FORM: tl.constexpr):
    number = row * (columns // 32) + unit
    first, second = pair(words_at(mem, o0), 2 * number)
    sevens = (
        ((first >> 9) & 0x7F) | ((first >> 17) & 0x7F00) | ((second << 7) & 0x7F0000) | ((second >> 1) & 0x7F000000)
    )
    signs = eighth_signs(sevens)
    scales = tl.load(mem + o1 + number).to(tl.int32)
    x_at = tl.broadcast_to(8 * unit, number.shape)
    w0, w1, w2, w3 = _four(tables, first)
    w4, w5, w6, w7 = _four(tables, second)
    total = dot16_signed(w0, w1, w2, w3, signs, words(xq, x_at), FORM) * odd(scales, 0)
    total += dot16_signed(w4, w5, w6, w7, signs >> 16, words(xq, x_at + 4), FORM) * odd(scales, 4)
    return total.to(tl.float32) * (0.125 * plane_scale(mem, o2, number >> 3)) * tl.load(xs + (x_at >> 3))


@triton.jit
def tile(mem, tables, o0, o1, o2, o3, row, half, lane, step, columns):
    block, sub = row * (columns // 256) + step // 4, 2 * (step % 4)
    return _tile32(mem, tables, o0, o1, o2, block, sub, half), _tile32(mem, tables, o0, o1, o2, block, sub + 1, half)


@triton.jit
def _tile32(mem, tables, o0, o1, o2, block, sub, half):
    codes = tl.load(words_at(mem, o0) + (16 * block + 2 * sub + half))
    w0, w1, w2, w3 = _four(tables, codes)
    scales = tl.load(mem + o1 + (8 * block + sub)).to(tl.int32) >> (4 * half)
    scale = exact(odd(scales, 0), 0) * (0.125 * plane_scale(mem, o2, block))
    return floats16(w0, w1, w2, w3, eighth_signs(_sevens(codes))) * scale
