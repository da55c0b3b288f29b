"""Experts in plain torch, from their GGUF bytes: slow, exact, the same on every device.

The reference that every other backend is tested against. One expert is dequantised, used and forgotten, and
its pairs are the same bits whoever asks: where an expert runs never changes a result.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch.nn import functional

from hybrimoe_kt.device.backend import CpuBackend, Routed
from hybrimoe_kt.device.experts import LayerExperts

from .dequantize import dequantize

__all__ = ["TorchReferenceCpu", "add_pairs", "dequantized", "expert_ffn"]


def expert_ffn(hidden: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """`down(silu(gate(x)) * up(x))` for `hidden [num_tokens, hidden]`; the matrices are `[out, in]`."""
    return functional.linear(functional.silu(functional.linear(hidden, gate)) * functional.linear(hidden, up), down)


def dequantized(experts: LayerExperts, parts: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Return gate, up `[inter, hidden]` and down `[hidden, inter]` of an expert's bytes in GGUF order."""
    for part, matrix in zip(parts, experts.matrices, strict=True):
        yield dequantize(part, matrix.ggml_type, (matrix.rows, matrix.columns))


def add_pairs(
    experts: LayerExperts, index: int, parts: Iterable[torch.Tensor], routed: Routed, out: torch.Tensor
) -> None:
    """Write an expert's weighted answers to where `ids` name it; its bytes are read only if they do."""
    token, place = torch.where(routed.ids == index)
    if token.numel() == 0:
        return
    answer = expert_ffn(routed.hidden[token], *dequantized(experts, parts))
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
