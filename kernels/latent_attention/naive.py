"""Reference of attention of one token to latents."""

from __future__ import annotations

import torch

__all__ = ["naive_latent_attention"]


def naive_latent_attention(
    query: torch.Tensor,
    rotated_query: torch.Tensor,
    latents: torch.Tensor,
    rotated: torch.Tensor,
    length: int,
    scaling: float,
) -> torch.Tensor:
    """Return float32 `[heads, rank]` for `query [heads, rank]` and `rotated_query [heads, rope]`.

    Keys are the first `length` rows of `latents [capacity, rank]` and `rotated [capacity, rope]`; latents are values.
    """
    latents, rotated = latents[:length].float(), rotated[:length].float()
    scores = query.float() @ latents.T + rotated_query.float() @ rotated.T
    return (scores * scaling).softmax(1) @ latents
