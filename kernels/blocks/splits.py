"""How kernels of attention divide the tokens held among splits, on the device: nothing on the host knows the length."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["seen_tokens", "split_tokens"]


@triton.jit
def seen_tokens(length, window):
    """First and end of the tokens that the last one sees: all that `length` int64 `[1]` says, or a window of them."""
    held = tl.load(length).to(tl.int32)
    return tl.where(window > 0, tl.maximum(held - window, 0), 0), held


@triton.jit
def split_tokens(first, end, splits, BLOCK: tl.constexpr):
    """Tokens a split: whole blocks, as many for all that have any."""
    return tl.cdiv(tl.cdiv(end - first, splits), BLOCK) * BLOCK
