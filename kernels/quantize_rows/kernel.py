"""Activation quantiser: float rows to int8 with a scale and a sum per 32 values."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hybrimoe_kt.kernels.configs import QuantizeConfig

__all__ = ["quantize_rows", "quantize_rows_kernel"]


@triton.jit
def quantize_rows_kernel(x, xq, xs, xm, num_blocks, BLOCKS: tl.constexpr):
    """Quantise blocks of 32 consecutive values; rows need no attention, as each is a whole number of blocks."""
    xq = xq.to(tl.pointer_type(tl.int8))
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)  # [BLOCKS]
    live = block < num_blocks
    at = block[:, None] * 32 + tl.arange(0, 32)[None, :]  # [BLOCKS, 32]
    values = tl.load(x + at, mask=live[:, None], other=0.0).to(tl.float32)
    scale = tl.max(tl.abs(values), axis=1) / 127.0
    inverse = tl.where(scale > 0, 1.0 / tl.where(scale > 0, scale, 1.0), 0.0)
    quants = tl.floor(values * inverse[:, None] + 0.5)
    tl.store(xq + at, quants.to(tl.int8), mask=live[:, None])
    tl.store(xs + block, scale, mask=live)
    tl.store(xm + block, scale * tl.sum(quants, axis=1), mask=live)


def quantize_rows(
    x: torch.Tensor, xq: torch.Tensor, xs: torch.Tensor, xm: torch.Tensor, config: QuantizeConfig
) -> None:
    """Write `xq` int32 `[T, W / 4]`, four int8 a word, float32 `xs` and `xm [T, W / 32]` for `x [T, W]`.

    All contiguous, W a multiple of 32.
    """
    num_blocks = x.numel() // 32
    grid = (triton.cdiv(num_blocks, config.blocks),)
    quantize_rows_kernel[grid](x, xq, xs, xm, num_blocks, BLOCKS=config.blocks, num_warps=config.num_warps)
