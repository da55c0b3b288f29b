"""Reference of the weighted sum."""

from __future__ import annotations

import torch

__all__ = ["naive_combine_pairs"]


def naive_combine_pairs(
    answers: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, slot_of: torch.Tensor
) -> torch.Tensor:
    """Return float32 `[T, H]`: the sum over `k` of `weights[t, k] * answers[t * K + k]` where the expert has a slot."""
    present = (ids >= 0) & (slot_of[ids.clamp_min(0)] >= 0)  # [T, K]
    pairs = torch.where(present[..., None], answers.view(*ids.shape, -1) * weights[..., None], 0.0)
    return pairs.sum(dim=1)
