"""Reference of the prefill step's second half."""

from __future__ import annotations

from collections.abc import Mapping

import torch

__all__ = ["naive_prefill_down"]


def naive_prefill_down(
    act: torch.Tensor,
    pairs: torch.Tensor,
    slots: torch.Tensor,
    matrices: Mapping[int, torch.Tensor],
    answers: torch.Tensor,
) -> None:
    """Write `down act` to the rows of `answers [T * K, H]` named by sorted `pairs`, block by block.

    `act [T * K, inter]`, `pairs [B * block]` and `slots [B]` as sort_pairs made them, `matrices[slot]` = down,
    float32 `[H, inter]`.
    """
    for mine, slot in zip(pairs.view(slots.shape[0], -1), slots.tolist(), strict=True):
        if slot >= 0:
            rows = mine[mine >= 0].long()
            answers[rows] = act[rows].float() @ matrices[slot].T
