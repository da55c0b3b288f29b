"""What a program of `linear_few` does once it knows its matrix."""

from __future__ import annotations

import triton
import triton.language as tl

from hybrimoe_kt.kernels.quants.dispatch import unit_dots, values_per_unit

__all__ = ["multiply_rows"]


@triton.jit
def multiply_rows(
    KIND: tl.constexpr,
    FORM: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    TOKENS: tl.constexpr,
    memory,
    tables,
    o0,
    o1,
    o2,
    o3,
    rows,
    columns,
    heads,
    block,
    first_token,
    num_tokens,
    x,
    xq,
    xs,
    xm,
    bias,
    out,
    total_rows,
):
    """Multiply row block `block` of a matrix of `heads * rows` rows with TOKENS tokens, of which some may not exist.

    `x` and its int8 form begin with the first token, `bias` and `out` with the matrix's first row. The loop over tokens
    is unrolled: the compiler sees that all of them load and unpack the same weights, and does so once.
    """
    blocks = tl.cdiv(rows, ROWS)
    head = block // blocks
    place = block % blocks * ROWS + tl.arange(0, ROWS)  # [ROWS], in the head
    row = head * rows + tl.minimum(place, rows - 1)
    num_units = columns // values_per_unit(KIND)
    totals = (tl.zeros([ROWS, UNITS], tl.float32),) * TOKENS
    for first in range(0, num_units, UNITS):
        unit = first + tl.arange(0, UNITS)[None, :]
        inside = tl.minimum(unit, num_units - 1)
        sums = ()
        for t in tl.static_range(TOKENS):
            line = tl.minimum(first_token + t, num_tokens - 1) * heads + head
            dots = unit_dots(
                KIND,
                FORM,
                memory,
                tables,
                o0,
                o1,
                o2,
                o3,
                row[:, None],
                inside,
                columns,
                tl.multiple_of(x + line * columns, 16),
                tl.multiple_of(xq + line * (columns // 4), 16),
                xs + line * (columns // 32),
                xm + line * (columns // 32),
            )
            sums = sums + (totals[t] + tl.where(unit < num_units, dots, 0.0),)  # noqa: RUF005
        totals = sums
    for t in tl.static_range(TOKENS):
        values = tl.sum(totals[t], axis=1)
        if bias is not None:
            values += tl.load(bias + row)
        at = out + (first_token + t) * total_rows + row
        tl.store(at, values.to(out.dtype.element_ty), mask=(place < rows) & (first_token + t < num_tokens))
