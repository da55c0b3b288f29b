"""Reference of the decode step's first half."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from hybrimoe_kt.expert_form import SWIGLU, ExpertForm

__all__ = ["naive_decode_gate_up"]


def naive_decode_gate_up(
    hidden: torch.Tensor,
    ids: torch.Tensor,
    matrices: Mapping[int, Sequence[torch.Tensor]],
    inter: int,
    form: ExpertForm = SWIGLU,
    biases: Mapping[int, Sequence[torch.Tensor]] | None = None,
) -> torch.Tensor:
    """Return gate and up of every pair, joined: float32 `[T * K, inter]`, zero for experts not in `matrices`.

    `hidden [T, H]`, `ids [T, K]`, `matrices[expert]` = gate and up, float32 `[inter, H]`, or up alone; `biases`
    likewise, `[inter]`.
    """
    num_tokens, top_k = ids.shape
    act = torch.zeros(num_tokens * top_k, inter)
    for pair, expert in enumerate(ids.flatten().tolist()):
        if expert in matrices:
            x = hidden[pair // top_k].float()
            added = biases[expert] if biases is not None else [0.0] * len(matrices[expert])
            *gates, up = (matrix @ x + bias for matrix, bias in zip(matrices[expert], added, strict=True))
            act[pair] = form.joined(gates[0] if gates else None, up)
    return act
