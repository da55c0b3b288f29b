"""Reference of the prefill step's first half."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional

__all__ = ["naive_prefill_gate_up"]


def naive_prefill_gate_up(
    hidden: torch.Tensor,
    pairs: torch.Tensor,
    slots: torch.Tensor,
    top_k: int,
    matrices: Mapping[int, tuple[torch.Tensor, torch.Tensor]],
    act: torch.Tensor,
) -> None:
    """Write `silu(gate x) * up x` to the rows of `act [T * K, inter]` named by sorted `pairs`, block by block.

    `hidden [T, H]`, `pairs [B * block]` and `slots [B]` as sort_pairs made them, `matrices[slot]` = gate and up,
    float32 `[inter, H]`.
    """
    for mine, slot in zip(pairs.view(slots.shape[0], -1), slots.tolist(), strict=True):
        if slot >= 0:
            rows = mine[mine >= 0].long()
            x = hidden[rows // top_k].float()
            gate, up = matrices[slot]
            act[rows] = (functional.silu(x @ gate.T) * (x @ up.T)).to(act.dtype)
