"""Experts in plain torch, from their GGUF bytes: slow, exact, the same on every device.

The reference that every other backend is tested against. One expert is dequantised, used and forgotten, and
its pairs are the same bits whoever asks: where an expert runs never changes a result.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch.nn import functional

from hybrimoe_kt.device.backend import CpuBackend, Routed
from hybrimoe_kt.device.experts import ROLES, LayerExperts, bias_of
from hybrimoe_kt.expert_form import SWIGLU, ExpertForm

from .dequantize import dequantize

__all__ = ["TorchReferenceCpu", "add_pairs", "expert_answer", "expert_ffn"]


def expert_ffn(
    hidden: torch.Tensor,
    gate: torch.Tensor | None,
    up: torch.Tensor,
    down: torch.Tensor,
    biases: Sequence[torch.Tensor] = (),
    form: ExpertForm = SWIGLU,
) -> torch.Tensor:
    """What an expert of that form answers to `hidden [num_tokens, hidden]`; the matrices are `[out, in]`.

    `biases` are of gate, if there is one, up and down, or none.
    """
    matrices = [matrix for matrix in (gate, up, down) if matrix is not None]
    each: Sequence[torch.Tensor | None] = biases or [None] * len(matrices)
    *gates, product = (functional.linear(hidden, *pair) for pair in zip(matrices[:-1], each[:-1], strict=True))
    return functional.linear(form.joined(gates[0] if gates else None, product), down, each[-1])


def expert_answer(experts: LayerExperts, parts: Iterable[torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    """The same of an expert's bytes in GGUF order."""
    named = {
        name: dequantize(part, matrix.ggml_type, (matrix.rows, matrix.columns))
        for (name, matrix), part in zip(experts.tensors.items(), parts, strict=True)
    }
    biases = [named[bias_of(role)].view(-1) for role in ROLES if bias_of(role) in named]
    return expert_ffn(hidden, named.get("gate"), named["up"], named["down"], biases, experts.form)


def add_pairs(
    experts: LayerExperts, index: int, parts: Iterable[torch.Tensor], routed: Routed, out: torch.Tensor
) -> None:
    """Write an expert's weighted answers to where `ids` name it; its bytes are read only if they do."""
    token, place = torch.where(routed.ids == index)
    if token.numel() == 0:
        return
    answer = expert_answer(experts, parts, routed.hidden[token])
    out[token, place] = answer * routed.weights[token, place, None]


class TorchReferenceCpu(CpuBackend):
    """Reads experts where the host store has them; computes when submitted, so it is always done."""

    name = "torch_reference"
    answers_pairs = True

    def __init__(self, num_threads: int = 0, max_tokens: int = 0) -> None:
        self._layers: dict[int, LayerExperts] = {}
        self._pairs = torch.empty(0)

    def add_layer(self, experts: LayerExperts) -> None:
        self._layers[experts.layer] = experts

    def submit(self, layer: int, routed: Routed) -> None:
        experts = self._layers[layer]
        self._pairs = torch.zeros(*routed.ids.shape, experts.hidden)
        for index in torch.unique(routed.ids[routed.ids >= 0]).tolist():
            add_pairs(experts, index, experts.parts(index), routed, self._pairs)

    def is_done(self) -> bool:
        return True

    def wait(self) -> torch.Tensor:
        return self._pairs
