"""Attention of one token to latents, which all heads share: each program reads a share of them, for some heads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hybrimoe_kt.kernels.attention_configs import LOG2_E, AttentionConfig
from hybrimoe_kt.kernels.blocks.splits import seen_tokens, split_tokens

__all__ = ["latent_attention", "latent_attention_kernel"]


@triton.jit
def latent_attention_kernel(
    query,
    rotated_query,
    latents,
    rotated,
    length,
    factor,
    num_heads,
    query_stride,
    rotated_query_stride,
    latent_stride,
    rotated_stride,
    answers,
    weights,
    RANK: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROPE: tl.constexpr,
    ROPE_COLUMNS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (block of heads, split); those behind the last token return at once.

    Blocks of heads vary fastest: the latents that they share come from the L2 cache. `factor` as of decode_attention.
    """
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    first, held = seen_tokens(length, 0)
    share = split_tokens(first, held, splits, BLOCK)
    begin = first + split * share
    end = tl.minimum(begin + share, held)
    if begin < end:
        column = tl.arange(0, COLUMNS)  # [COLUMNS]
        rope = tl.arange(0, ROPE_COLUMNS)
        head = tl.program_id(0) * HEADS + tl.arange(0, HEADS)  # [HEADS]
        is_head = head < num_heads
        live = is_head[:, None] & (column < RANK)[None, :]
        q = tl.load(query + head[:, None] * query_stride + column[None, :], mask=live, other=0.0)
        turned = is_head[:, None] & (rope < ROPE)[None, :]
        r = tl.load(rotated_query + head[:, None] * rotated_query_stride + rope[None, :], mask=turned, other=0.0)
        peak = tl.full([HEADS], float("-inf"), tl.float32)
        total = tl.zeros([HEADS], tl.float32)
        answer = tl.zeros([HEADS, COLUMNS], tl.float32)
        for at in range(begin, end, BLOCK):
            token = at + tl.arange(0, BLOCK)  # [BLOCK]
            inside = token < end
            row = token.to(tl.int64)[:, None]
            here = inside[:, None] & (column < RANK)[None, :]
            # The compiler sees that rows begin on 16 bytes.
            latent_at = tl.multiple_of(latents, 16) + row * (latent_stride // 8 * 8) + column[None, :]
            latent = tl.load(latent_at, mask=here, other=0.0).to(q.dtype)  # [BLOCK, COLUMNS]
            there = inside[:, None] & (rope < ROPE)[None, :]
            rotated_at = tl.multiple_of(rotated, 16) + row * (rotated_stride // 8 * 8) + rope[None, :]
            key = tl.load(rotated_at, mask=there, other=0.0).to(q.dtype)  # [BLOCK, ROPE_COLUMNS]
            score = tl.dot(q, tl.trans(latent), input_precision="ieee")  # [HEADS, BLOCK]
            score = tl.dot(r, tl.trans(key), score, input_precision="ieee") * factor
            score = tl.where(inside[None, :], score, float("-inf"))
            higher = tl.maximum(peak, tl.max(score, axis=1))
            weight = tl.exp2(score - higher[:, None])
            shrink = tl.exp2(peak - higher)
            answer = tl.dot(weight.to(latent.dtype), latent, answer * shrink[:, None], input_precision="ieee")
            total = total * shrink + tl.sum(weight, axis=1)
            peak = higher
        out = head.to(tl.int64) * splits + split
        tl.store(answers + out[:, None] * RANK + column[None, :], answer / total[:, None], mask=live)
        tl.store(weights + out, peak + tl.log2(total), mask=is_head)


def latent_attention(
    query: torch.Tensor,
    rotated_query: torch.Tensor,
    latents: torch.Tensor,
    rotated: torch.Tensor,
    length: torch.Tensor,
    scaling: float,
    answers: torch.Tensor,
    weights: torch.Tensor,
    config: AttentionConfig,
) -> None:
    """Write what each split of the tokens answers, for `merge_splits`, and the logarithm to base 2 of its weight.

    `query [heads, rank]`, `rotated_query [heads, rope]`, `latents [capacity, rank]`, `rotated [capacity, rope]`: rows
    and dtypes as of `decode_attention`, and `length`, too. `answers` float32 `[heads, splits, rank]`, `weights`
    `[heads, splits]`.
    """
    num_heads = query.shape[0]
    latent_attention_kernel[(triton.cdiv(num_heads, config.heads), weights.shape[1])](
        query,
        rotated_query,
        latents,
        rotated,
        length,
        scaling * LOG2_E,
        num_heads,
        query.stride(0),
        rotated_query.stride(0),
        latents.stride(0),
        rotated.stride(0),
        answers,
        weights,
        RANK=latents.shape[1],
        COLUMNS=config.columns,
        ROPE=rotated.shape[1],
        ROPE_COLUMNS=max(16, triton.next_power_of_2(rotated.shape[1])),
        HEADS=config.heads,
        BLOCK=config.block,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
