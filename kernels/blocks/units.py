"""What matrix-vector kernels do with 16 bytes of packed weights, one format after the other.

A *unit* is what one thread loads at once: 16 bytes of quants, 32 weights of 4 to 6 bits or 16 of 8. Every function
returns the float32 dot products `[R, V]` of units `unit [1, V]` of rows `row [R, 1]` with one token's activations,
which are int8 in blocks of 32: words `xq`, scales `xs`, and block sums `xm` (scale times the sum of the quants, for
the formats that subtract a minimum). Byte tricks: a word holds four quants; `(q + 0x60) ^ 0x80` in every byte is
`q - 32` as a signed byte, without a carry between bytes. Indices are never negative, which the compiler cannot see:
shifts and masks save it the care that division takes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .dot import dot4
from .fields import exact, half, plane_scale, scales_and_minima, words_at
from .kinds import BF16, F16, Q4_0, Q4_K, Q5_0, Q5_K, Q6_K, Q8_0


@triton.jit
def _words(base, offset):
    """Load four elements from each `offset [R, V]`, a multiple of 4: `[R, V, 4]`, of int32 one 16-byte load."""
    lanes = tl.arange(0, 4)[None, None, :]
    return tl.load(base + (offset[:, :, None] + lanes))


@triton.jit
def _pick(words):
    """Take `[R, V, 4]` apart into four `[R, V]`."""
    even, odd = tl.split(tl.reshape(words, [words.shape[0], words.shape[1], 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _dot16(words, x_words, FORM: tl.constexpr):
    """Dot products of 16 int8 pairs, `[R, V, 4]` words each: int32 `[R, V]`."""
    w0, w1, w2, w3 = _pick(words)
    x0, x1, x2, x3 = _pick(x_words)
    total = dot4(w0, x0, tl.zeros(w0.shape, tl.int32), FORM)
    return dot4(w3, x3, dot4(w2, x2, dot4(w1, x1, total, FORM), FORM), FORM)


@triton.jit
def _affine(d, scale, minimum, low, high, xs, xm, at):
    """Combine a Q4_K or Q5_K unit; `at` is the first of its two activation blocks.

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
def _q4_k(mem, o0, row, unit, columns, xq, xs, xm, FORM: tl.constexpr):
    """Block of 144 bytes: d, dmin, 12 bytes of scales, then 4 chunks of 32 bytes: 64 values, low nibbles first."""
    base = words_at(mem, o0)
    block, chunk, half = unit >> 3, (unit >> 1) & 3, unit & 1
    start = (row * (columns // 256) + block) * 36
    d, first, second, third = _pick(_words(base, start))
    scale, minimum = scales_and_minima(first, second, third, chunk)
    quants = _words(base, start + 4 + 8 * chunk + 4 * half)
    x_at = tl.broadcast_to(64 * block + 16 * chunk + 4 * half, start.shape)
    low = _dot16(quants & 0x0F0F0F0F, _words(xq, x_at), FORM)
    high = _dot16((quants >> 4) & 0x0F0F0F0F, _words(xq, x_at + 8), FORM)
    return _affine(d, scale, minimum, low, high, xs, xm, x_at >> 3)


@triton.jit
def _q5_k(mem, o0, row, unit, columns, xq, xs, xm, FORM: tl.constexpr):
    """Block of 176 bytes: as Q4_K, with 32 bytes of fifth bits before the quants: bit i for the i-th 32 values."""
    base = words_at(mem, o0)
    block, chunk, half = unit >> 3, (unit >> 1) & 3, unit & 1
    start = (row * (columns // 256) + block) * 44
    d, first, second, third = _pick(_words(base, start))
    scale, minimum = scales_and_minima(first, second, third, chunk)
    fifth = _words(base, start + 4 + 4 * half) >> (2 * chunk)[:, :, None]
    quants = _words(base, start + 12 + 8 * chunk + 4 * half)
    x_at = tl.broadcast_to(64 * block + 16 * chunk + 4 * half, start.shape)
    low = _dot16((quants & 0x0F0F0F0F) | ((fifth & 0x01010101) << 4), _words(xq, x_at), FORM)
    high = _dot16(((quants >> 4) & 0x0F0F0F0F) | ((fifth & 0x02020202) << 3), _words(xq, x_at + 8), FORM)
    return _affine(d, scale, minimum, low, high, xs, xm, x_at >> 3)


@triton.jit
def _q6_k(mem, o0, o1, o2, o3, row, unit, columns, xq, xs, FORM: tl.constexpr):
    """Planes ql (128 bytes a block), qh (64), scales (16 int8), d. A block is two runs of 128 values; byte l of a
    run's 64 in ql holds value l and, above it, value l + 64."""
    block, run, group, half = unit >> 3, (unit >> 2) & 1, (unit >> 1) & 1, unit & 1
    number = row * (columns // 256) + block
    low_bits = _words(words_at(mem, o0), 32 * number + 4 * (unit & 7))
    high_bits = _words(words_at(mem, o1), 16 * number + 8 * run + 4 * half) >> (2 * group)[:, :, None]
    low = (low_bits & 0x0F0F0F0F) | ((high_bits & 0x03030303) << 4)
    high = ((low_bits >> 4) & 0x0F0F0F0F) | (high_bits & 0x30303030)
    x_at = tl.broadcast_to(64 * block + 32 * run + 8 * group + 4 * half, number.shape)
    low_sum = _dot16((low + 0x60606060) ^ -0x7F7F7F80, _words(xq, x_at), FORM)
    high_sum = _dot16((high + 0x60606060) ^ -0x7F7F7F80, _words(xq, x_at + 16), FORM)
    scales = (mem + o2).to(tl.pointer_type(tl.int8)) + 16 * number + 8 * run + 2 * group + half
    low_sum *= tl.load(scales).to(tl.int32)
    high_sum *= tl.load(scales + 4).to(tl.int32)
    low_part = low_sum.to(tl.float32) * tl.load(xs + (x_at >> 3))
    high_part = high_sum.to(tl.float32) * tl.load(xs + (x_at >> 3) + 2)
    return plane_scale(mem, o3, number) * (low_part + high_part)


@triton.jit
def _q8_0(mem, o0, o1, row, unit, columns, xq, xs, FORM: tl.constexpr):
    """Planes qs (32 int8 a block), d. Two units a block."""
    number = row * (columns // 32) + (unit >> 1)
    quants = _words(words_at(mem, o0), 8 * number + 4 * (unit & 1))
    x_at = tl.broadcast_to(4 * unit, number.shape)
    total = _dot16(quants, _words(xq, x_at), FORM).to(tl.float32)
    return total * plane_scale(mem, o1, number) * tl.load(xs + (x_at >> 3))


@triton.jit
def _q4_0(mem, o0, o1, row, unit, columns, xq, xs, FORM: tl.constexpr):
    """Planes qs (16 bytes a block: 16 low nibbles, then 16 high), d."""
    number = row * (columns // 32) + unit
    quants = _words(words_at(mem, o0), 4 * number)
    x_at = tl.broadcast_to(8 * unit, number.shape)
    low = ((quants & 0x0F0F0F0F) + 0x78787878) ^ -0x7F7F7F80
    high = (((quants >> 4) & 0x0F0F0F0F) + 0x78787878) ^ -0x7F7F7F80
    total = _dot16(low, _words(xq, x_at), FORM) + _dot16(high, _words(xq, x_at + 4), FORM)
    return total.to(tl.float32) * plane_scale(mem, o1, number) * tl.load(xs + (x_at >> 3))


@triton.jit
def _spread(bits):
    """Move the low four bits of `bits` to bit 4 of the four bytes of a word."""
    return (((bits & 0xF) * 0x00204081) & 0x01010101) << 4


@triton.jit
def _q5_0(mem, o0, o1, o2, row, unit, columns, xq, xs, FORM: tl.constexpr):
    """Planes qs (as Q4_0), qh (a word a block, bit j for value j), d."""
    number = row * (columns // 32) + unit
    quants = _words(words_at(mem, o0), 4 * number)
    fifth = tl.load(words_at(mem, o1) + number)[:, :, None] >> (4 * tl.arange(0, 4))[None, None, :]
    x_at = tl.broadcast_to(8 * unit, number.shape)
    low = (((quants & 0x0F0F0F0F) | _spread(fifth)) + 0x70707070) ^ -0x7F7F7F80
    high = ((((quants >> 4) & 0x0F0F0F0F) | _spread(fifth >> 16)) + 0x70707070) ^ -0x7F7F7F80
    total = _dot16(low, _words(xq, x_at), FORM) + _dot16(high, _words(xq, x_at + 4), FORM)
    return total.to(tl.float32) * plane_scale(mem, o2, number) * tl.load(xs + (x_at >> 3))


@triton.jit
def _pair_dot(word, x_even, x_odd, KIND: tl.constexpr):
    """Dot product of the two 16-bit floats of `word` with two activations; bfloat16 is a float32's upper half."""
    if KIND == BF16:
        even, odd = (word << 16).to(tl.float32, bitcast=True), (word & -0x10000).to(tl.float32, bitcast=True)
    else:
        even, odd = half(word), half(word >> 16)
    return even * x_even + odd * x_odd


@triton.jit
def _halves(mem, o0, row, unit, columns, x, KIND: tl.constexpr):
    """Eight F16 or BF16 values a unit, times float activations."""
    w0, w1, w2, w3 = _pick(_words(words_at(mem, o0), (row * (columns // 8) + unit) * 4))
    x_at = tl.broadcast_to(8 * unit, w0.shape)
    x0, x1, x2, x3 = _pick(_words(x, x_at).to(tl.float32))
    x4, x5, x6, x7 = _pick(_words(x, x_at + 4).to(tl.float32))
    first = _pair_dot(w0, x0, x1, KIND) + _pair_dot(w1, x2, x3, KIND)
    return first + _pair_dot(w2, x4, x5, KIND) + _pair_dot(w3, x6, x7, KIND)


@triton.jit
def unit_dots(KIND: tl.constexpr, FORM: tl.constexpr, mem, o0, o1, o2, o3, row, unit, columns, x, xq, xs, xm):
    """Dot products float32 `[R, V]` of one matrix's units with one token's activations.

    `mem` points to the slot, `o0` to `o3` are the byte offsets of the matrix's planes in it; `x` (float, for F16 and
    BF16), `xq`, `xs` and `xm` point to the token's row.
    """
    if KIND == Q4_K:
        return _q4_k(mem, o0, row, unit, columns, xq, xs, xm, FORM)
    elif KIND == Q5_K:
        return _q5_k(mem, o0, row, unit, columns, xq, xs, xm, FORM)
    elif KIND == Q6_K:
        return _q6_k(mem, o0, o1, o2, o3, row, unit, columns, xq, xs, FORM)
    elif KIND == Q8_0:
        return _q8_0(mem, o0, o1, row, unit, columns, xq, xs, FORM)
    elif KIND == Q4_0:
        return _q4_0(mem, o0, o1, row, unit, columns, xq, xs, FORM)
    elif KIND == Q5_0:
        return _q5_0(mem, o0, o1, o2, row, unit, columns, xq, xs, FORM)
    else:
        tl.static_assert(KIND == F16 or KIND == BF16, "no kernel reads this type")
        return _halves(mem, o0, row, unit, columns, x, KIND)


@triton.jit
def values_per_unit(KIND: tl.constexpr):
    """How many weights a unit holds."""
    if KIND == Q8_0:
        return 16
    elif KIND == F16 or KIND == BF16:
        return 8
    else:
        return 32
