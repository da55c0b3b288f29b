"""IQ2_S: planes qs (32 code words of eight values) with signs (32 bytes), qh (ninth and tenth bits), scales, d."""

from __future__ import annotations

import triton
import triton.language as tl

from hybrimoe_kt.kernels.blocks.code_words import dot16_signed, floats16, odd, pair
from hybrimoe_kt.kernels.blocks.fields import exact, plane_scale, words_at
from hybrimoe_kt.kernels.blocks.words import words
from hybrimoe_kt.kernels.tables import OFFSETS

__all__ = ["KIND", "tile", "unit"]

KIND = tl.constexpr(22)
GRID = tl.constexpr(OFFSETS["IQ2_S"])


@triton.jit
def _four(tables, places, upper):
    """Look up the code words of two bytes and the low two pairs of bits of `upper`, two words each."""
    w0, w1 = pair(words_at(tables, GRID), 2 * ((places & 0xFF) | ((upper << 8) & 0x300)))
    w2, w3 = pair(words_at(tables, GRID), 2 * (((places >> 8) & 0xFF) | ((upper << 6) & 0x300)))
    return w0, w1, w2, w3


@triton.jit
def unit(mem, tables, o0, o1, o2, o3, row, unit, columns, x, xq, xs, xm, FORM: tl.constexpr):
    number = row * (columns // 32) + unit
    places_at = words_at(mem, o0) + (16 * (number >> 3) + (number & 7))
    places, signs = tl.load(places_at), tl.load(places_at + 8)
    upper, scales = tl.load(mem + o1 + number).to(tl.int32), tl.load(mem + o2 + number).to(tl.int32)
    x_at = tl.broadcast_to(8 * unit, number.shape)
    w0, w1, w2, w3 = _four(tables, places, upper)
    w4, w5, w6, w7 = _four(tables, places >> 16, upper >> 4)
    total = dot16_signed(w0, w1, w2, w3, signs, words(xq, x_at), FORM) * odd(scales, 0)
    total += dot16_signed(w4, w5, w6, w7, signs >> 16, words(xq, x_at + 4), FORM) * odd(scales, 4)
    return total.to(tl.float32) * (0.125 * plane_scale(mem, o3, number >> 3)) * tl.load(xs + (x_at >> 3))


@triton.jit
def tile(mem, tables, o0, o1, o2, o3, row, half, lane, step, columns):
    block, sub = row * (columns // 256) + step // 4, 2 * (step % 4)
    return _tile32(mem, tables, o0, o1, o2, o3, block, sub, half), _tile32(
        mem, tables, o0, o1, o2, o3, block, sub + 1, half
    )


@triton.jit
def _tile32(mem, tables, o0, o1, o2, o3, block, sub, half):
    places_at = words_at(mem, o0) + (16 * block + sub)
    upper = tl.load(mem + o1 + (8 * block + sub)).to(tl.int32) >> (4 * half)
    w0, w1, w2, w3 = _four(tables, tl.load(places_at) >> (16 * half), upper)
    scales = tl.load(mem + o2 + (8 * block + sub)).to(tl.int32) >> (4 * half)
    scale = exact(odd(scales, 0), 0) * (0.125 * plane_scale(mem, o3, block))
    return floats16(w0, w1, w2, w3, tl.load(places_at + 8) >> (16 * half)) * scale
