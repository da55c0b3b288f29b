"""Reference of the prefill step's first half."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from hybrimoe_kt.expert_form import SWIGLU, ExpertForm

__all__ = ["naive_prefill_gate_up"]


def naive_prefill_gate_up(
    hidden: torch.Tensor,
    pairs: torch.Tensor,
    slots: torch.Tensor,
    top_k: int,
    matrices: Mapping[int, Sequence[torch.Tensor]],
    act: torch.Tensor,
    form: ExpertForm = SWIGLU,
    biases: Mapping[int, Sequence[torch.Tensor]] | None = None,
) -> None:
    """Write gate and up, joined, to the rows of `act [T * K, inter]` named by sorted `pairs`, block by block.

    `hidden [T, H]`, `pairs [B * block]` and `slots [B]` as sort_pairs made them, `matrices[slot]` = gate and up,
    float32 `[inter, H]`, or up alone; `biases` likewise, `[inter]`.
    """
    for mine, slot in zip(pairs.view(slots.shape[0], -1), slots.tolist(), strict=True):
        if slot >= 0:
            rows = mine[mine >= 0].long()
            x = hidden[rows // top_k].float()
            added = biases[slot] if biases is not None else [0.0] * len(matrices[slot])
            *gates, up = (x @ matrix.T + bias for matrix, bias in zip(matrices[slot], added, strict=True))
            act[rows] = form.joined(gates[0] if gates else None, up).to(act.dtype)
