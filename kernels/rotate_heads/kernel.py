"""Rotary positions of queries and keys in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hybrimoe_kt.kernels.row_configs import RotateConfig, power_of_two
from hybrimoe_kt.kernels.row_forms import Rotation

from .block import rotate_block

__all__ = ["rotate_heads", "rotate_heads_kernel"]


@triton.jit
def rotate_heads_kernel(
    query,
    query_token_stride,
    query_head_stride,
    query_heads,
    key,
    key_token_stride,
    key_head_stride,
    key_heads,
    cos,
    sin,
    angle_token_stride,
    angle_stride,
    num_tokens,
    query_out,
    key_out,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    FROM_PAIRS: tl.constexpr,
    TO_PAIRS: tl.constexpr,
    WIDE: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Program (block of heads, token): the queries' blocks, then the keys'."""
    block = tl.program_id(0)
    token = tl.program_id(1).to(tl.int64)
    pair = tl.arange(0, PAIRS)
    angle_at = token * angle_token_stride + pair * angle_stride
    turn_cos = tl.load(cos + angle_at, mask=pair < HALF, other=0.0).to(tl.float32)
    turn_sin = tl.load(sin + angle_at, mask=pair < HALF, other=0.0).to(tl.float32)
    query_blocks = tl.cdiv(query_heads, HEADS)
    if block < query_blocks:
        rotate_block(
            query,
            query_token_stride,
            query_head_stride,
            query_out,
            num_tokens,
            token,
            block * HEADS + tl.arange(0, HEADS),
            query_heads,
            turn_cos,
            turn_sin,
            WIDTH,
            HALF,
            PAIRS,
            REST,
            FROM_PAIRS,
            TO_PAIRS,
            WIDE,
        )
    else:
        rotate_block(
            key,
            key_token_stride,
            key_head_stride,
            key_out,
            num_tokens,
            token,
            (block - query_blocks) * HEADS + tl.arange(0, HEADS),
            key_heads,
            turn_cos,
            turn_sin,
            WIDTH,
            HALF,
            PAIRS,
            REST,
            FROM_PAIRS,
            TO_PAIRS,
            WIDE,
        )


def rotate_heads(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    query_out: torch.Tensor,
    key_out: torch.Tensor,
    rotation: Rotation,
    config: RotateConfig,
) -> None:
    """Write `query [heads, T, W]` and `key [kv_heads, T, W]` turned by angles `cos` and `sin [T, P]`.

    Rows in one piece, their distances multiples of 8, outputs contiguous and of the same dtype; `cos` and `sin` of
    one dtype and stride, which any may be.
    """
    (query_heads, num_tokens, width), key_heads, half = query.shape, key.shape[0], cos.shape[1]
    grid = (triton.cdiv(query_heads, config.heads) + triton.cdiv(key_heads, config.heads), num_tokens)
    rest = width - 2 * half
    rotate_heads_kernel[grid](
        query,
        query.stride(1),
        query.stride(0),
        query_heads,
        key,
        key.stride(1),
        key.stride(0),
        key_heads,
        cos,
        sin,
        cos.stride(0),
        cos.stride(1),
        num_tokens,
        query_out,
        key_out,
        WIDTH=width,
        HALF=half,
        PAIRS=power_of_two(half),
        REST=power_of_two(rest) if rest else 0,
        FROM_PAIRS=rotation.from_pairs,
        TO_PAIRS=rotation.to_pairs,
        WIDE=rotation.is_wide,
        HEADS=config.heads,
        num_warps=config.num_warps,
    )
