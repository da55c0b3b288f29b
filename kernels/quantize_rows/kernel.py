"""Activation quantiser: float rows, or SwiGLU of two, to int8 with a scale and a sum per 32 values."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hybrimoe_kt.kernels.configs import QuantizeConfig

__all__ = ["quantize_rows", "quantize_rows_kernel"]


@triton.jit
def quantize_rows_kernel(
    x, up, xq, xs, xm, num_blocks, row_blocks, x_stride, up_stride, GATED: tl.constexpr, BLOCKS: tl.constexpr
):
    """Quantise blocks of 32 consecutive values; rows are a whole number of blocks.

    GATED: of silu(x) * up, each rounded to their dtype.
    """
    xq = xq.to(tl.pointer_type(tl.int8))
    number = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)  # [BLOCKS]
    block = number.to(tl.int64)
    live = block < num_blocks
    at = block[:, None] * 32 + tl.arange(0, 32)[None, :]  # [BLOCKS, 32]
    row = (number // row_blocks).to(tl.int64)  # multiples of 8 apart: the compiler sees it
    column = (number % row_blocks * 32)[:, None] + tl.arange(0, 32)[None, :]
    x_at = (row * (x_stride // 8 * 8))[:, None] + column
    values = tl.load(x + x_at, mask=live[:, None], other=0.0).to(tl.float32)
    if GATED:
        up_at = (row * (up_stride // 8 * 8))[:, None] + column
        factor = tl.load(up + up_at, mask=live[:, None], other=0.0).to(tl.float32)
        gate = (values / (1.0 + tl.exp(-values))).to(x.dtype.element_ty).to(tl.float32)
        values = (gate * factor).to(x.dtype.element_ty).to(tl.float32)
    scale = tl.max(tl.abs(values), axis=1) / 127.0
    inverse = tl.where(scale > 0, 1.0 / tl.where(scale > 0, scale, 1.0), 0.0)
    quants = tl.floor(values * inverse[:, None] + 0.5)
    tl.store(xq + at, quants.to(tl.int8), mask=live[:, None])
    tl.store(xs + block, scale, mask=live)
    tl.store(xm + block, scale * tl.sum(quants, axis=1), mask=live)


def quantize_rows(
    x: torch.Tensor,
    xq: torch.Tensor,
    xs: torch.Tensor,
    xm: torch.Tensor,
    config: QuantizeConfig,
    *,
    up: torch.Tensor | None = None,
) -> None:
    """Write `xq` int32 `[T, W / 4]`, four int8 a word, float32 `xs` and `xm [T, W / 32]` for `x [T, W]`.

    W is a multiple of 32; all contiguous, but for the rows of `x`, whose distance is a multiple of 8. With `up`, of the
    same shape and dtype, for silu(x) * up.
    """
    num_blocks = x.numel() // 32
    grid = (triton.cdiv(num_blocks, config.blocks),)
    quantize_rows_kernel[grid](
        x,
        x if up is None else up,
        xq,
        xs,
        xm,
        num_blocks,
        x.shape[-1] // 32,
        x.stride(0),
        x.stride(0) if up is None else up.stride(0),
        GATED=up is not None,
        BLOCKS=config.blocks,
        num_warps=config.num_warps,
    )
