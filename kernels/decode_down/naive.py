"""Reference of the decode step's second half."""

from __future__ import annotations

from collections.abc import Mapping

import torch

__all__ = ["naive_decode_down"]


def naive_decode_down(
    act: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, matrices: Mapping[int, torch.Tensor]
) -> torch.Tensor:
    """Return the weighted sum over each token's experts, float32 `[T, H]`; experts not in `matrices` add nothing.

    `act [T * K, inter]`, `ids` and `weights [T, K]`, `matrices[expert]` = down, float32 `[H, inter]`.
    """
    num_tokens, top_k = ids.shape
    out = torch.zeros(num_tokens, next(iter(matrices.values())).shape[0])
    for pair, expert in enumerate(ids.flatten().tolist()):
        if expert in matrices:
            out[pair // top_k] += weights.flatten()[pair] * (matrices[expert] @ act[pair])
    return out
