"""Reference of attention of one token with grouped queries."""

from __future__ import annotations

import torch

__all__ = ["naive_decode_attention"]


def naive_decode_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    length: int,
    scaling: float,
    window: int = 0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return float32 `[heads, width]` for `query [heads, width]` and `keys`, `values [kv_heads, capacity, width]`.

    Of the first `length` tokens the last `window` are seen, 0: all; `sinks [heads]` are scores of nothing.
    """
    seen = slice(max(0, length - window) if window else 0, length)
    group = query.shape[0] // keys.shape[0]
    keys, values = (part[:, seen].float().repeat_interleave(group, 0) for part in (keys, values))
    scores = torch.einsum("hw,htw->ht", query.float(), keys) * scaling
    if sinks is not None:
        scores = torch.cat((scores, sinks.float()[:, None]), 1)
    return torch.einsum("ht,htw->hw", scores.softmax(1)[:, : keys.shape[1]], values)
