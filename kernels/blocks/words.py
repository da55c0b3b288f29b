"""16-byte loads and dot products, as matrix-vector kernels make them: four words of a thread side by side."""

from __future__ import annotations

import triton
import triton.language as tl

from .dot import dot4

__all__ = ["dot16", "pick", "scales_of_four", "sum16", "words"]


@triton.jit
def words(base, offset):
    """Load four elements from each `offset [R, V]`, a multiple of 4: `[R, V, 4]`, of int32 one 16-byte load."""
    lanes = tl.arange(0, 4)[None, None, :]
    return tl.load(base + (offset[:, :, None] + lanes))


@triton.jit
def pick(four):
    """Take `[R, V, 4]` apart into four `[R, V]`."""
    even, odd = tl.split(tl.reshape(four, [four.shape[0], four.shape[1], 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def dot16(w, x, FORM: tl.constexpr):
    """Dot products of 16 int8 pairs, `[R, V, 4]` words each: int32 `[R, V]`."""
    w0, w1, w2, w3 = pick(w)
    x0, x1, x2, x3 = pick(x)
    total = dot4(w0, x0, tl.zeros(w0.shape, tl.int32), FORM)
    return dot4(w3, x3, dot4(w2, x2, dot4(w1, x1, total, FORM), FORM), FORM)


@triton.jit
def sum16(x, FORM: tl.constexpr):
    """Sums of 16 int8, `[R, V, 4]` words each: int32 `[R, V]`."""
    return dot16(tl.full(x.shape, 0x01010101, tl.int32), x, FORM)


@triton.jit
def scales_of_four(xs, first):
    """Scales of the four blocks from `first [R, V]`, a multiple of 4, in rows of a multiple of 128 activations."""
    lanes = tl.arange(0, 4)[None, None, :]
    return pick(tl.load(tl.multiple_of(xs + (first[:, :, None] + lanes), [1, 1, 16])))
