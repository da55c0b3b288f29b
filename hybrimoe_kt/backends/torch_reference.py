"""Experts in plain torch, from their GGUF bytes: slow, exact, the same on every device.

The reference that every other backend is tested against. One expert is dequantised, used and forgotten, and
its pairs are the same bits whoever asks: where an expert runs never changes a result.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch.nn import functional

from hybrimoe_kt.device.host_store import LayerExperts

from .dequantize import dequantize

__all__ = ["TorchReferenceCpu", "TorchReferenceGpu", "expert_ffn"]


def expert_ffn(hidden: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """`down(silu(gate(x)) * up(x))` for `hidden [num_tokens, hidden]`; the matrices are `[out, in]`."""
    return functional.linear(functional.silu(functional.linear(hidden, gate)) * functional.linear(hidden, up), down)


def _add_pairs(
    experts: LayerExperts,
    index: int,
    parts: Iterable[torch.Tensor],
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    pairs: torch.Tensor,
) -> None:
    token, place = torch.where(ids == index)
    if token.numel() == 0:
        return
    gate, up, down = (
        dequantize(part, matrix.ggml_type, (matrix.rows, matrix.columns))
        for part, matrix in zip(parts, experts.matrices, strict=True)
    )
    pairs[token, place] = expert_ffn(hidden[token], gate, up, down) * weights[token, place, None]


class TorchReferenceCpu:
    """Reads experts where the host store has them; computes when submitted, so `wait` returns at once."""

    name = "torch_reference"

    def __init__(self) -> None:
        self._layers: dict[int, LayerExperts] = {}
        self._pairs = torch.empty(0)

    def add_layer(self, experts: LayerExperts) -> None:
        self._layers[experts.layer] = experts

    def submit(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        experts = self._layers[layer]
        self._pairs = torch.zeros(*ids.shape, hidden.shape[1])
        for index in torch.unique(ids[ids >= 0]).tolist():
            parts = (matrix.data[index] for matrix in experts.matrices)
            _add_pairs(experts, index, parts, hidden, ids, weights, self._pairs)

    def wait(self) -> torch.Tensor:
        return self._pairs


class TorchReferenceGpu:
    """Reads experts from slots, on whatever device the slots are."""

    name = "torch_reference"

    def __init__(self) -> None:
        self._layers: dict[int, LayerExperts] = {}

    def add_layer(self, experts: LayerExperts) -> None:
        self._layers[experts.layer] = experts

    def compute(
        self,
        layer: int,
        slots: Mapping[int, torch.Tensor],
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        pairs: torch.Tensor,
    ) -> None:
        experts = self._layers[layer]
        sizes = [matrix.num_bytes for matrix in experts.matrices]
        for index, slot in slots.items():
            _add_pairs(experts, index, slot[: sum(sizes)].split(sizes), hidden, ids, weights, pairs)
