"""Attention of one token with grouped queries: each program reads a share of the tokens held, of one key-value head."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hybrimoe_kt.kernels.attention_configs import LOG2_E, AttentionConfig
from hybrimoe_kt.kernels.blocks.splits import seen_tokens, split_tokens

__all__ = ["decode_attention", "decode_attention_kernel"]


@triton.jit
def decode_attention_kernel(
    query,
    keys,
    values,
    length,
    factor,
    window,
    group,
    query_stride,
    key_head_stride,
    key_stride,
    value_head_stride,
    value_stride,
    answers,
    weights,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (split, key-value head); those behind the last token return at once.

    `factor` makes scores exponents of two. HEADS and COLUMNS are `group` and WIDTH, or more, as tensor cores want them.
    """
    split = tl.program_id(0)
    splits = tl.num_programs(0)
    kv_head = tl.program_id(1).to(tl.int64)
    first, held = seen_tokens(length, window)
    share = split_tokens(first, held, splits, BLOCK)
    begin = first + split * share
    end = tl.minimum(begin + share, held)
    if begin < end:
        column = tl.arange(0, COLUMNS)  # [COLUMNS]
        place = tl.arange(0, HEADS)  # [HEADS], in the group
        head = kv_head * group + place
        live = (place < group)[:, None] & (column < WIDTH)[None, :]  # [HEADS, COLUMNS]
        q = tl.load(query + head[:, None] * query_stride + column[None, :], mask=live, other=0.0)
        key = tl.multiple_of(keys, 16) + kv_head * (key_head_stride // 8 * 8)  # the compiler sees that rows begin on 16
        value = tl.multiple_of(values, 16) + kv_head * (value_head_stride // 8 * 8)
        peak = tl.full([HEADS], float("-inf"), tl.float32)
        total = tl.zeros([HEADS], tl.float32)
        answer = tl.zeros([HEADS, COLUMNS], tl.float32)
        for at in range(begin, end, BLOCK):
            token = at + tl.arange(0, BLOCK)  # [BLOCK]
            inside = token < end
            here = inside[:, None] & (column < WIDTH)[None, :]
            k_at = key + token.to(tl.int64)[:, None] * (key_stride // 8 * 8) + column[None, :]
            k = tl.load(k_at, mask=here, other=0.0).to(q.dtype)  # [BLOCK, COLUMNS]
            score = tl.dot(q, tl.trans(k), input_precision="ieee") * factor  # [HEADS, BLOCK]
            score = tl.where(inside[None, :], score, float("-inf"))
            higher = tl.maximum(peak, tl.max(score, axis=1))
            weight = tl.exp2(score - higher[:, None])
            shrink = tl.exp2(peak - higher)
            v_at = value + token.to(tl.int64)[:, None] * (value_stride // 8 * 8) + column[None, :]
            v = tl.load(v_at, mask=here, other=0.0).to(q.dtype)
            answer = tl.dot(weight.to(v.dtype), v, answer * shrink[:, None], input_precision="ieee")
            total = total * shrink + tl.sum(weight, axis=1)
            peak = higher
        row = head * splits + split
        tl.store(answers + row[:, None] * WIDTH + column[None, :], answer / total[:, None], mask=live)
        tl.store(weights + row, peak + tl.log2(total), mask=place < group)


def decode_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    length: torch.Tensor,
    scaling: float,
    answers: torch.Tensor,
    weights: torch.Tensor,
    config: AttentionConfig,
    window: int = 0,
) -> None:
    """Write what each split of the tokens answers, for `merge_splits`, and the logarithm to base 2 of its weight.

    `query [heads, width]`; `keys` and `values [kv_heads, capacity, width]`, whose rows are contiguous, of one float
    dtype, begin on 16 bytes and are multiples of 8 numbers apart. Of another dtype than the query's, they are rounded
    to that as they are read. `length` int64 `[1]`, at least 1: of the tokens in front that are held, of which the last
    `window` are seen, 0: all. `answers` float32 `[heads, splits, width]`, `weights` `[heads, splits]`; splits without
    tokens are left as they are.
    """
    kv_heads, _, width = keys.shape
    decode_attention_kernel[(weights.shape[1], kv_heads)](
        query,
        keys,
        values,
        length,
        scaling * LOG2_E,
        window,
        query.shape[0] // kv_heads,
        query.stride(0),
        keys.stride(0),
        keys.stride(1),
        values.stride(0),
        values.stride(1),
        answers,
        weights,
        WIDTH=width,
        COLUMNS=config.columns,
        HEADS=config.heads,
        BLOCK=config.block,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
