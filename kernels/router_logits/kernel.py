"""Routers' products in float32, of states and weights as they are: widened in registers, not in memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hybrimoe_kt.kernels.row_configs import LogitsConfig

__all__ = ["router_logits", "router_logits_kernel"]


@triton.jit
def router_logits_kernel(
    x,
    weight,
    factors,
    num_experts,
    of_one,
    width,
    out,
    SEVERAL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Program (expert block, token). SEVERAL: routers of `of_one` experts, each with its own `factors` on x."""
    expert = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    token = tl.program_id(1).to(tl.int64)
    width = width // 8 * 8  # says that it is a multiple, so that loads are wide
    live = expert < num_experts
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, width, COLUMNS):
        column = first + tl.arange(0, COLUMNS)  # [COLUMNS]
        inside = column < width
        given = tl.load(x + token * width + column, mask=inside, other=0.0).to(tl.float32)
        at = expert.to(tl.int64)[:, None] * width + column[None, :]
        weights = tl.load(weight + at, mask=live[:, None] & inside[None, :], other=0.0).to(tl.float32)
        if SEVERAL:
            factor_at = (expert // of_one).to(tl.int64)[:, None] * width + column[None, :]
            factor = tl.load(factors + factor_at, mask=live[:, None] & inside[None, :], other=0.0).to(tl.float32)
            total += (given[None, :] * factor).to(weight.dtype.element_ty).to(tl.float32) * weights
        else:
            total += given[None, :] * weights
    tl.store(out + token * num_experts + expert, tl.sum(total, axis=1), mask=live)


def router_logits(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    config: LogitsConfig,
    factors: torch.Tensor | None = None,
) -> None:
    """Write `out` float32 `[T, E]` for `x [T, W]` and `weight [E, W]`, any floats; contiguous, W a multiple of 8.

    With `factors [N, W]` the experts are N routers' one after the other, each of which is given `x` times its factors,
    rounded to the dtype of `weight`.
    """
    (num_tokens, width), num_experts = x.shape, weight.shape[0]
    grid = (triton.cdiv(num_experts, config.rows), num_tokens)
    router_logits_kernel[grid](
        x,
        weight,
        x if factors is None else factors,
        num_experts,
        num_experts if factors is None else num_experts // len(factors),
        width,
        out,
        SEVERAL=factors is not None,
        ROWS=config.rows,
        COLUMNS=config.columns,
        num_warps=config.num_warps,
    )
