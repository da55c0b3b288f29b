"""Prefill, last: a token's answers weighted and added up by the program that owns its output, without atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hybrimoe_kt.kernels.configs import CombineConfig

__all__ = ["combine_pairs", "combine_pairs_kernel"]


@triton.jit
def combine_pairs_kernel(
    answers,
    ids,
    weights,
    slot_of,
    num_experts,
    num_tokens,
    top_k,
    hidden,
    out,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Program (token block, column block)."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)  # [TOKENS]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    inside = token < num_tokens
    width = hidden // 8 * 8
    live = inside[:, None] & (column < width)[None, :]
    at = token.to(tl.int64)[:, None] * width + column[None, :]
    total = tl.zeros([TOKENS, COLUMNS], tl.float32)
    num_present = tl.zeros([TOKENS], tl.int32)
    for place in range(0, top_k):
        pair = token.to(tl.int64) * top_k + place
        expert = tl.load(ids + pair, mask=inside, other=-1).to(tl.int32)
        known = (expert >= 0) & (expert < num_experts)
        present = tl.load(slot_of + expert, mask=known, other=-1) >= 0  # [TOKENS]
        num_present += present.to(tl.int32)
        weight = tl.load(weights + pair, mask=present, other=0.0)
        answer_at = pair[:, None] * width + column[None, :]
        answer = tl.load(tl.multiple_of(answers, 16) + answer_at, mask=live & present[:, None], other=0.0)
        total += weight[:, None] * answer
    # After a single late expert most tokens have nothing to add; their outputs are neither read nor written.
    changed = live & (num_present > 0)[:, None]
    out_at = tl.multiple_of(out, 16) + at
    tl.store(out_at, total + tl.load(out_at, mask=changed, other=0.0), mask=changed)


def combine_pairs(
    answers: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    slot_of: torch.Tensor,
    out: torch.Tensor,
    config: CombineConfig,
) -> None:
    """Add every token's weighted answers to `out` float32 `[T, H]`; pairs without a slot are not read.

    `answers` float32 `[T * K, H]`, `ids` int64 and `weights` float32 `[T, K]`, `slot_of` int32 `[num_experts]`.
    """
    num_tokens, top_k = ids.shape
    hidden = out.shape[1]
    grid = (triton.cdiv(num_tokens, config.tokens), triton.cdiv(hidden, config.columns))
    combine_pairs_kernel[grid](
        answers,
        ids,
        weights,
        slot_of,
        slot_of.shape[0],
        num_tokens,
        top_k,
        hidden,
        out,
        TOKENS=config.tokens,
        COLUMNS=config.columns,
        num_warps=config.num_warps,
    )
