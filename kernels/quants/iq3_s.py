"""IQ3_S: planes qs (64 code words of four values), qh (their ninth bits), signs (32 bytes) with scales (4), d."""

from __future__ import annotations

import triton
import triton.language as tl

from hybrimoe_kt.kernels.blocks.code_words import dot16_signed, floats16, odd, pair
from hybrimoe_kt.kernels.blocks.fields import exact, plane_scale, words_at
from hybrimoe_kt.kernels.blocks.words import words
from hybrimoe_kt.kernels.tables import OFFSETS

__all__ = ["KIND", "tile", "unit"]

KIND = tl.constexpr(21)
GRID = tl.constexpr(OFFSETS["IQ3_S"])


@triton.jit
def _four(tables, places, ninth):
    """Look up the code words of four bytes and the low four bits of `ninth`."""
    grid = words_at(tables, GRID)
    first = tl.load(grid + ((places & 0xFF) | ((ninth << 8) & 0x100)))
    second = tl.load(grid + (((places >> 8) & 0xFF) | ((ninth << 7) & 0x100)))
    third = tl.load(grid + (((places >> 16) & 0xFF) | ((ninth << 6) & 0x100)))
    return first, second, third, tl.load(grid + (((places >> 24) & 0xFF) | ((ninth << 5) & 0x100)))


@triton.jit
def unit(mem, tables, o0, o1, o2, o3, row, unit, columns, x, xq, xs, xm, FORM: tl.constexpr):
    number = row * (columns // 32) + unit
    ninth = tl.load(mem + o1 + number).to(tl.int32)
    signs_at = words_at(mem, o2) + 9 * (number >> 3)
    signs, scale = tl.load(signs_at + (number & 7)), tl.load(signs_at + 8) >> (4 * (number & 7))
    first, second = pair(words_at(mem, o0), 2 * number)
    x_at = tl.broadcast_to(8 * unit, number.shape)
    w0, w1, w2, w3 = _four(tables, first, ninth)
    w4, w5, w6, w7 = _four(tables, second, ninth >> 4)
    total = dot16_signed(w0, w1, w2, w3, signs, words(xq, x_at), FORM)
    total += dot16_signed(w4, w5, w6, w7, signs >> 16, words(xq, x_at + 4), FORM)
    scaled = (total * odd(scale, 0)).to(tl.float32) * plane_scale(mem, o3, number >> 3)
    return scaled * tl.load(xs + (x_at >> 3))


@triton.jit
def tile(mem, tables, o0, o1, o2, o3, row, half, lane, step, columns):
    block, sub = row * (columns // 256) + step // 4, 2 * (step % 4)
    return _tile32(mem, tables, o0, o1, o2, o3, block, sub, half), _tile32(
        mem, tables, o0, o1, o2, o3, block, sub + 1, half
    )


@triton.jit
def _tile32(mem, tables, o0, o1, o2, o3, block, sub, half):
    ninth = tl.load(mem + o1 + (8 * block + sub)).to(tl.int32) >> (4 * half)
    w0, w1, w2, w3 = _four(tables, tl.load(words_at(mem, o0) + (16 * block + 2 * sub + half)), ninth)
    signs_at = words_at(mem, o2) + 9 * block
    signs, scale = tl.load(signs_at + sub), tl.load(signs_at + 8) >> (4 * sub)
    scale = exact(odd(scale, 0), 0) * plane_scale(mem, o3, block)
    return floats16(w0, w1, w2, w3, signs >> (16 * half)) * scale
