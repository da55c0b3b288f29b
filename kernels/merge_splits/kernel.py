"""The answers of attention's splits, weighted and added up."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hybrimoe_kt.kernels.attention_configs import LOG2_E, AttentionConfig, MergeConfig
from hybrimoe_kt.kernels.blocks.splits import seen_tokens, split_tokens

__all__ = ["merge_splits", "merge_splits_kernel"]


@triton.jit
def merge_splits_kernel(
    answers,
    weights,
    length,
    window,
    splits,
    sinks,
    width,
    factor,
    out,
    BLOCK: tl.constexpr,
    TOGETHER: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Program (head, block of columns); BLOCK as of the kernel that made the splits, of which TOGETHER are added."""
    head = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    width = width // 8 * 8  # the compiler sees that rows begin on 16 bytes
    first, held = seen_tokens(length, window)
    live = tl.cdiv(held - first, split_tokens(first, held, splits, BLOCK))
    peak = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    if sinks is not None:
        peak = tl.load(sinks + head).to(tl.float32) * factor
        total += 1.0
    answer = tl.zeros([COLUMNS], tl.float32)
    for at in range(0, live, TOGETHER):
        split = at + tl.arange(0, TOGETHER)  # [TOGETHER]
        row = head * splits + split
        weight = tl.load(weights + row, mask=split < live, other=float("-inf"))
        higher = tl.maximum(peak, tl.max(weight, axis=0))
        weight = tl.exp2(weight - higher)
        shrink = tl.exp2(peak - higher)
        inside = (split < live)[:, None] & (column < width)[None, :]
        answer_at = tl.multiple_of(answers, 16) + row[:, None] * width + column[None, :]
        part = tl.load(answer_at, mask=inside, other=0.0)  # [TOGETHER, COLUMNS]
        answer = answer * shrink + tl.sum(part * weight[:, None], axis=0)
        total = total * shrink + tl.sum(weight, axis=0)
        peak = higher
    at_out = out + head * width + column
    tl.store(at_out, (answer / total).to(out.dtype.element_ty), mask=column < width)


def merge_splits(
    answers: torch.Tensor,
    weights: torch.Tensor,
    length: torch.Tensor,
    out: torch.Tensor,
    attention: AttentionConfig,
    config: MergeConfig,
    window: int = 0,
    sinks: torch.Tensor | None = None,
) -> None:
    """Write the sum of `answers` float32 `[heads, splits, width]` to `out` float `[heads, width]`, contiguous.

    `weights [heads, splits]` are logarithms to base 2; splits without tokens are not read. `length`, `window` and
    `attention` as the splits were made with; `sinks [heads]` are scores of nothing.
    """
    heads, splits, width = answers.shape
    merge_splits_kernel[(heads, triton.cdiv(width, config.columns))](
        answers,
        weights,
        length,
        window,
        splits,
        sinks,
        width,
        LOG2_E,
        out,
        BLOCK=attention.block,
        TOGETHER=config.splits,
        COLUMNS=config.columns,
        num_warps=config.num_warps,
    )
