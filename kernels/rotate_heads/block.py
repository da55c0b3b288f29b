"""Some heads of one token, turned."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["rotate_block"]


@triton.jit
def rotate_block(
    x,
    token_stride,
    head_stride,
    out,
    num_tokens,
    token,
    head,
    num_heads,
    cos,
    sin,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    FROM_PAIRS: tl.constexpr,
    TO_PAIRS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Turn heads `head [HEADS]` of `x` into `out [num_heads, num_tokens, WIDTH]`; `cos` and `sin` float32 `[PAIRS]`."""
    pair = tl.arange(0, PAIRS)
    inside = (head < num_heads)[:, None]
    live = inside & (pair < HALF)[None, :]
    kind = x.dtype.element_ty
    row = x + token * (token_stride // 8 * 8) + head.to(tl.int64)[:, None] * (head_stride // 8 * 8)  # [HEADS, 1]
    answer = out + (head.to(tl.int64)[:, None] * num_tokens + token) * WIDTH
    first_at = (2 * pair if FROM_PAIRS else pair)[None, :]
    second_at = (2 * pair + 1 if FROM_PAIRS else pair + HALF)[None, :]
    first = tl.load(row + first_at, mask=live, other=0.0).to(tl.float32)
    second = tl.load(row + second_at, mask=live, other=0.0).to(tl.float32)
    first_cos, second_sin = first * cos[None, :], second * sin[None, :]
    second_cos, first_sin = second * cos[None, :], first * sin[None, :]
    if not WIDE:
        first_cos, second_sin = first_cos.to(kind).to(tl.float32), second_sin.to(kind).to(tl.float32)
        second_cos, first_sin = second_cos.to(kind).to(tl.float32), first_sin.to(kind).to(tl.float32)
    first_at = (2 * pair if TO_PAIRS else pair)[None, :]
    second_at = (2 * pair + 1 if TO_PAIRS else pair + HALF)[None, :]
    tl.store(answer + first_at, (first_cos - second_sin).to(kind), mask=live)
    tl.store(answer + second_at, (second_cos + first_sin).to(kind), mask=live)
    if REST > 0:
        rest = 2 * HALF + tl.arange(0, REST)
        kept = inside & (rest < WIDTH)[None, :]
        tl.store(answer + rest[None, :], tl.load(row + rest[None, :], mask=kept, other=0.0), mask=kept)
