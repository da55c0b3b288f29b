"""Reference of the decode step's first half."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional

__all__ = ["naive_decode_gate_up"]


def naive_decode_gate_up(
    hidden: torch.Tensor, ids: torch.Tensor, matrices: Mapping[int, tuple[torch.Tensor, torch.Tensor]], inter: int
) -> torch.Tensor:
    """Return `silu(gate x) * up x` of every pair: float32 `[T * K, inter]`, zero for experts not in `matrices`.

    `hidden [T, H]`, `ids [T, K]`, `matrices[expert]` = gate and up, float32 `[inter, H]`.
    """
    num_tokens, top_k = ids.shape
    act = torch.zeros(num_tokens * top_k, inter)
    for pair, expert in enumerate(ids.flatten().tolist()):
        if expert in matrices:
            gate, up = matrices[expert]
            x = hidden[pair // top_k].float()
            act[pair] = functional.silu(gate @ x) * (up @ x)
    return act
