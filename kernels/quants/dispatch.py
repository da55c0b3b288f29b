"""The one place where a kernel's constant KIND, GGML's number, chooses a type's functions."""

from __future__ import annotations

import triton
import triton.language as tl

from . import bf16, f16, iq4_nl, iq4_xs, mxfp4, q2_k, q3_k, q4_0, q4_1, q4_k, q5_0, q5_1, q5_k, q6_k, q8_0

__all__ = ["step_columns", "step_tiles", "unit_dots", "values_per_unit"]


@triton.jit
def unit_dots(KIND: tl.constexpr, FORM: tl.constexpr, mem, tables, o0, o1, o2, o3, row, unit, columns, x, xq, xs, xm):
    """Dot products float32 `[R, V]` of units `unit [1, V]` of rows `row [R, 1]` with one token's activations.

    A *unit* is what one thread loads at once: 16 bytes of quants, 64 weights of 2 or 3 bits, 32 of 4 to 6, 16 of 8.
    `mem` points to the slot, `o0` to `o3` are the byte offsets of the matrix's planes in it; `tables` points to the
    code words. The others point to the token's row: `x` (float, for F16 and BF16), and its int8 form in blocks of 32:
    words `xq`, scales `xs`, and block sums `xm` (scale times the sum of the quants, for the types with a minimum).

    Byte tricks: a word holds four quants; `(q + 0x60) ^ 0x80` in every byte is `q - 32` as a signed byte, without a
    carry between bytes. Indices are never negative, which the compiler cannot see: shifts and masks save it the care
    that division takes.
    """
    if KIND == q4_k.KIND:
        return q4_k.unit(mem, tables, o0, o1, o2, o3, row, unit, columns, x, xq, xs, xm, FORM)
    elif KIND == q5_k.KIND:
        return q5_k.unit(mem, tables, o0, o1, o2, o3, row, unit, columns, x, xq, xs, xm, FORM)
    elif KIND == q6_k.KIND:
        return q6_k.unit(mem, tables, o0, o1, o2, o3, row, unit, columns, x, xq, xs, xm, FORM)
    elif KIND == q8_0.KIND:
        return q8_0.unit(mem, tables, o0, o1, o2, o3, row, unit, columns, x, xq, xs, xm, FORM)
    elif KIND == q4_0.KIND:
        return q4_0.unit(mem, tables, o0, o1, o2, o3, row, unit, columns, x, xq, xs, xm, FORM)
    elif KIND == q5_0.KIND:
        return q5_0.unit(mem, tables, o0, o1, o2, o3, row, unit, columns, x, xq, xs, xm, FORM)
    elif KIND == q4_1.KIND:
        return q4_1.unit(mem, tables, o0, o1, o2, o3, row, unit, columns, x, xq, xs, xm, FORM)
    elif KIND == q5_1.KIND:
        return q5_1.unit(mem, tables, o0, o1, o2, o3, row, unit, columns, x, xq, xs, xm, FORM)
    elif KIND == iq4_nl.KIND:
        return iq4_nl.unit(mem, tables, o0, o1, o2, o3, row, unit, columns, x, xq, xs, xm, FORM)
    elif KIND == iq4_xs.KIND:
        return iq4_xs.unit(mem, tables, o0, o1, o2, o3, row, unit, columns, x, xq, xs, xm, FORM)
    elif KIND == mxfp4.KIND:
        return mxfp4.unit(mem, tables, o0, o1, o2, o3, row, unit, columns, x, xq, xs, xm, FORM)
    elif KIND == q2_k.KIND:
        return q2_k.unit(mem, tables, o0, o1, o2, o3, row, unit, columns, x, xq, xs, xm, FORM)
    elif KIND == q3_k.KIND:
        return q3_k.unit(mem, tables, o0, o1, o2, o3, row, unit, columns, x, xq, xs, xm, FORM)
    elif KIND == bf16.KIND:
        return bf16.unit(mem, tables, o0, o1, o2, o3, row, unit, columns, x, xq, xs, xm, FORM)
    else:
        tl.static_assert(KIND == f16.KIND, "no kernel reads this type")
        return f16.unit(mem, tables, o0, o1, o2, o3, row, unit, columns, x, xq, xs, xm, FORM)


@triton.jit
def values_per_unit(KIND: tl.constexpr):
    """How many weights a unit holds."""
    if KIND == q8_0.KIND:
        return 16
    elif KIND == f16.KIND or KIND == bf16.KIND:
        return 8
    elif KIND == q2_k.KIND or KIND == q3_k.KIND:
        return 64
    else:
        return 32


@triton.jit
def step_columns(KIND: tl.constexpr, step):
    """Columns of the low and the high tile of `step`: int32 `[32]` each."""
    lane = tl.arange(0, 32)
    if (
        KIND == q4_0.KIND
        or KIND == q5_0.KIND
        or KIND == q4_1.KIND
        or KIND == q5_1.KIND
        or KIND == iq4_nl.KIND
        or KIND == iq4_xs.KIND
        or KIND == mxfp4.KIND
    ):
        return q4_0.columns(step, lane)
    elif KIND == q6_k.KIND:
        return q6_k.columns(step, lane)
    else:
        low = 64 * step + lane
        return low, low + 32


@triton.jit
def step_tiles(KIND: tl.constexpr, FORM: tl.constexpr, mem, tables, o0, o1, o2, o3, row, step, columns):
    """Dequantise one step, 64 columns, of rows `row [N]`: the low and the high tile, float32 `[N, 32]` each.

    For 4 to 6 bits these are the values in the low and the high nibbles of the same 32 bytes, so that neither tile
    waits for a shuffle. High nibbles stay where they are, 16 times as large, and their scales are a sixteenth: exact,
    and a shift less. Which columns they are, `step_columns` says. Tiles are dequantised in registers; the caller rounds
    them to what its tensor cores take.

    A type's `tile` has rows `[N, 1, 1]`, halves of a tile `half [1, 2, 1]`, lanes `[1, 1, 16]`, and answers with
    `[N, 2, 16]` twice.
    """
    row = row[:, None, None]
    half = tl.arange(0, 2)[None, :, None]
    lane = tl.arange(0, 16)[None, None, :]
    if KIND == q4_k.KIND:
        low, high = q4_k.tile(mem, tables, o0, o1, o2, o3, row, half, lane, step, columns)
    elif KIND == q5_k.KIND:
        low, high = q5_k.tile(mem, tables, o0, o1, o2, o3, row, half, lane, step, columns)
    elif KIND == q6_k.KIND:
        low, high = q6_k.tile(mem, tables, o0, o1, o2, o3, row, half, lane, step, columns)
    elif KIND == q8_0.KIND:
        low, high = q8_0.tile(mem, tables, o0, o1, o2, o3, row, half, lane, step, columns)
    elif KIND == q4_0.KIND:
        low, high = q4_0.tile(mem, tables, o0, o1, o2, o3, row, half, lane, step, columns)
    elif KIND == q5_0.KIND:
        low, high = q5_0.tile(mem, tables, o0, o1, o2, o3, row, half, lane, step, columns)
    elif KIND == q4_1.KIND:
        low, high = q4_1.tile(mem, tables, o0, o1, o2, o3, row, half, lane, step, columns)
    elif KIND == q5_1.KIND:
        low, high = q5_1.tile(mem, tables, o0, o1, o2, o3, row, half, lane, step, columns)
    elif KIND == iq4_nl.KIND:
        low, high = iq4_nl.tile(mem, tables, o0, o1, o2, o3, row, half, lane, step, columns, FORM)
    elif KIND == iq4_xs.KIND:
        low, high = iq4_xs.tile(mem, tables, o0, o1, o2, o3, row, half, lane, step, columns, FORM)
    elif KIND == mxfp4.KIND:
        low, high = mxfp4.tile(mem, tables, o0, o1, o2, o3, row, half, lane, step, columns, FORM)
    elif KIND == q2_k.KIND:
        low, high = q2_k.tile(mem, tables, o0, o1, o2, o3, row, half, lane, step, columns)
    elif KIND == q3_k.KIND:
        low, high = q3_k.tile(mem, tables, o0, o1, o2, o3, row, half, lane, step, columns)
    elif KIND == bf16.KIND:
        low, high = bf16.tile(mem, tables, o0, o1, o2, o3, row, half, lane, step, columns)
    else:
        tl.static_assert(KIND == f16.KIND, "no kernel reads this type")
        low, high = f16.tile(mem, tables, o0, o1, o2, o3, row, half, lane, step, columns)
    return tl.reshape(low, [low.shape[0], 32]), tl.reshape(high, [high.shape[0], 32])
