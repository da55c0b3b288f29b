"""Linear layers of a few rows of activations: a pass over the weights of up to three that share their input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from hybrimoe_kt.kernels.configs import FewConfig
from hybrimoe_kt.kernels.workspace import MatrixInSlot

from .matrix import multiply_rows

__all__ = ["linear_few", "linear_few_kernel"]


@triton.jit
def linear_few_kernel(
    memory,
    tables,
    x,
    xq,
    xs,
    xm,
    num_tokens,
    columns,
    heads,
    bias,
    out,
    total_rows,
    a_rows,
    a0,
    a1,
    a2,
    a3,
    b_rows,
    b0,
    b1,
    b2,
    b3,
    c_rows,
    c0,
    c1,
    c2,
    c3,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    THIRD: tl.constexpr,
    FORM: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Program (row block, group of tokens); groups vary fastest, so that all but one read weights from the L2 cache.

    Rows are those of a head, blocks are counted over all heads and matrices. SECOND and THIRD are negative where there
    is no such matrix.
    """
    groups = tl.cdiv(num_tokens, TOKENS)
    token = tl.program_id(0) % groups * TOKENS
    block = tl.program_id(0) // groups
    second = tl.cdiv(a_rows, ROWS) * heads
    third = second + tl.cdiv(b_rows, ROWS)
    if SECOND < 0 or block < second:
        multiply_rows(
            FIRST, FORM, ROWS, UNITS, TOKENS, memory, tables, a0, a1, a2, a3, a_rows, columns, heads,
            block, token, num_tokens, x, xq, xs, xm, bias, out, total_rows,
        )  # fmt: skip
    elif THIRD < 0 or block < third:
        multiply_rows(
            SECOND, FORM, ROWS, UNITS, TOKENS, memory, tables, b0, b1, b2, b3, b_rows, columns, heads,
            block - second, token, num_tokens, x, xq, xs, xm,
            None if bias is None else bias + a_rows, out + a_rows, total_rows,
        )  # fmt: skip
    else:
        multiply_rows(
            THIRD, FORM, ROWS, UNITS, TOKENS, memory, tables, c0, c1, c2, c3, c_rows, columns, heads,
            block - third, token, num_tokens, x, xq, xs, xm,
            None if bias is None else bias + a_rows + b_rows, out + a_rows + b_rows, total_rows,
        )  # fmt: skip


def linear_few(
    memory: torch.Tensor,
    tables: torch.Tensor,
    matrices: Sequence[MatrixInSlot],
    heads: int,
    x: torch.Tensor,
    quantized: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    bias: torch.Tensor | None,
    out: torch.Tensor,
    config: FewConfig,
) -> None:
    """Write the matrices' products with `x` to `out [T, total_rows]` float, one matrix's rows after the other's.

    `memory` uint8 `[num_bytes]`, `x [T, heads, columns]`. With more than one head there is one matrix, whose rows are
    as many groups: each is multiplied with its own head of x. `quantized` = int8 as words int32, `columns / 4` a row of
    x, float32 scales and sums, `columns / 32` a row: of any size, not read, where all matrices are F16 or BF16. Where
    none is, `x` is not read. `bias` float32 `[total_rows]`.
    """
    num_tokens, columns = x.shape[0], matrices[0].columns
    xq, xs, xm = quantized
    rows = [matrix.rows // heads for matrix in matrices]
    missing = 3 - len(matrices)
    first, second, third = [matrix.type.number for matrix in matrices] + [-1] * missing
    places = [value for matrix, n in zip(matrices, rows, strict=True) for value in (n, *matrix.offsets)]
    blocks = sum(triton.cdiv(n, config.rows) for n in rows) * heads
    reads_x = any(matrix.type.is_float for matrix in matrices)
    linear_few_kernel[(blocks * triton.cdiv(num_tokens, config.tokens),)](
        memory,
        tables,
        x if reads_x else xs,  # one compiled form for all dtypes
        xq,
        xs,
        xm,
        num_tokens,
        columns,
        heads,
        bias,
        out,
        sum(rows) * heads,
        *places,
        *[0] * (5 * missing),
        FIRST=first,
        SECOND=second,
        THIRD=third,
        FORM=config.form,
        ROWS=config.rows,
        UNITS=config.units,
        TOKENS=config.tokens,
        num_warps=config.num_warps,
    )
