"""Norm by root mean square: a program holds whole rows, so each is read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hybrimoe_kt.kernels.row_configs import NormConfig

__all__ = ["rms_norm", "rms_norm_kernel"]


@triton.jit
def rms_norm_kernel(
    x,
    residual,
    more,
    weight,
    num_rows,
    width,
    x_stride,
    epsilon,
    out,
    total,
    OFFSET: tl.constexpr,
    ROUNDS_FIRST: tl.constexpr,
    ADDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Program (row block)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    column = tl.arange(0, COLUMNS)  # [COLUMNS]
    width = width // 8 * 8  # says that it is a multiple, so that loads are wide
    inside = column < width
    live = (row < num_rows)[:, None] & inside[None, :]
    dense_at = row[:, None] * width + column[None, :]
    values = tl.load(x + row[:, None] * (x_stride // 8 * 8) + column[None, :], mask=live, other=0.0)
    if ADDS:
        others = tl.load(residual + dense_at, mask=live, other=0.0).to(tl.float32)
        if ADDS == 2:
            others += tl.load(more + dense_at, mask=live, other=0.0).to(tl.float32)
            others = others.to(x.dtype.element_ty).to(tl.float32)
        values = (values.to(tl.float32) + others).to(x.dtype.element_ty)
        tl.store(total + dense_at, values, mask=live)
    wide = values.to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide, axis=1) / width + epsilon)[:, None]
    if ROUNDS_FIRST:
        normed = normed.to(x.dtype.element_ty).to(tl.float32)
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) + OFFSET
    tl.store(out + dense_at, (normed * factor[None, :]).to(x.dtype.element_ty), mask=live)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    out: torch.Tensor,
    config: NormConfig,
    *,
    offset: float = 0.0,
    rounds_first: bool = True,
    residual: torch.Tensor | None = None,
    more: torch.Tensor | None = None,
    total: torch.Tensor | None = None,
) -> None:
    """Write the norm of `x [N, W]`, or of `x + residual`, to `out [N, W]`, and that sum to `total [N, W]`.

    With `more`, of `x + (residual + more)`, each sum rounded.

    All of one dtype and contiguous, but for the rows of `x`; W and the distance of these are multiples of 8.
    """
    num_rows, width = x.shape
    grid = (triton.cdiv(num_rows, config.rows),)
    rms_norm_kernel[grid](
        x,
        x if residual is None else residual,
        x if more is None else more,
        weight,
        num_rows,
        width,
        x.stride(0),
        epsilon,
        out,
        out if total is None else total,
        OFFSET=offset,
        ROUNDS_FIRST=rounds_first,
        ADDS=(residual is not None) + (more is not None),
        ROWS=config.rows,
        COLUMNS=config.columns,
        num_warps=config.num_warps,
    )
