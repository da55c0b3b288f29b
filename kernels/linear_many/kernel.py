"""A linear layer of many rows of activations, on tensor cores."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hybrimoe_kt.kernels.configs import PrefillConfig
from hybrimoe_kt.kernels.quants.dispatch import step_columns, step_tiles
from hybrimoe_kt.kernels.workspace import MatrixInSlot

__all__ = ["linear_many", "linear_many_kernel"]


@triton.jit
def linear_many_kernel(
    memory,
    tables,
    x,
    num_tokens,
    columns,
    heads,
    rows,
    o0,
    o1,
    o2,
    o3,
    bias,
    out,
    total_rows,
    KIND: tl.constexpr,
    FORM: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Program (block of tokens, row block); `rows` are those of a head, blocks are counted over all heads.

    Blocks of tokens vary fastest: the weights that they share come from the L2 cache.
    """
    blocks = tl.cdiv(rows, ROWS)
    head = tl.program_id(1) // blocks
    place = tl.program_id(1) % blocks * ROWS + tl.arange(0, ROWS)  # [ROWS], in the head
    row = head * rows + tl.minimum(place, rows - 1)
    first = (tl.program_id(0) * TOKENS).to(tl.int64)
    lane = tl.arange(0, TOKENS)  # [TOKENS], a token of the block
    num_lanes = tl.minimum(num_tokens - tl.program_id(0) * TOKENS, TOKENS)
    width = columns // 8 * 8  # the compiler sees that rows begin on 16 bytes
    x_row = tl.multiple_of(x, 16) + (first * heads + head) * width
    x_row += (tl.minimum(lane, num_lanes - 1) * (heads * width))[None, :]  # [1, TOKENS]
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    for step in range(0, tl.cdiv(columns, 64)):
        low, high = step_columns(KIND, step)
        x_low = tl.load(x_row + low[:, None], mask=low[:, None] < width, other=0.0)  # [32, TOKENS]
        x_high = tl.load(x_row + high[:, None], mask=high[:, None] < width, other=0.0)
        w_low, w_high = step_tiles(KIND, FORM, memory, tables, o0, o1, o2, o3, row, step, columns)
        total = tl.dot(w_low.to(x_low.dtype), x_low, total)
        total = tl.dot(w_high.to(x_low.dtype), x_high, total)
    if bias is not None:
        total += tl.load(bias + row)[:, None]
    at = out + first * total_rows + (lane * total_rows)[:, None] + row[None, :]  # [TOKENS, ROWS]
    live = (lane < num_lanes)[:, None] & (place < rows)[None, :]
    tl.store(at, tl.trans(total).to(out.dtype.element_ty), mask=live)


def linear_many(
    memory: torch.Tensor,
    tables: torch.Tensor,
    matrix: MatrixInSlot,
    heads: int,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    config: PrefillConfig,
) -> None:
    """Write the product with `x` to `out [T, rows]` float, whose rows need not follow each other: views of a wider one.

    `memory` uint8 `[num_bytes]`, `x [T, heads, columns]` float16 or bfloat16; with more than one head the matrix's rows
    are as many groups, each multiplied with its own head of x. `bias` float32 `[rows]`.
    """
    num_tokens, rows = x.shape[0], matrix.rows // heads
    grid = (triton.cdiv(num_tokens, config.pairs), heads * triton.cdiv(rows, config.rows))
    linear_many_kernel[grid](
        memory,
        tables,
        x,
        num_tokens,
        matrix.columns,
        heads,
        rows,
        *matrix.offsets,
        bias,
        out,
        out.stride(0),
        KIND=matrix.type.number,
        FORM=config.form,
        ROWS=config.rows,
        TOKENS=config.pairs,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
