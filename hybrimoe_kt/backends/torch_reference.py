"""Experts in plain torch, from their GGUF bytes: slow, exact, the same on every device.

The reference that every other backend is tested against. One expert is dequantised, used and forgotten, and
its pairs are the same bits whoever asks: where an expert runs never changes a result.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch.nn import functional

from hybrimoe_kt.device.experts import LayerExperts
from hybrimoe_kt.device.layout import SlotLayout
from hybrimoe_kt.errors import KernelError

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
    """Reads experts where the host store has them; computes when submitted, so it is always done."""

    name = "torch_reference"
    answers_pairs = True

    def __init__(self) -> None:
        self._layers: dict[int, LayerExperts] = {}
        self._pairs = torch.empty(0)

    def add_layer(self, experts: LayerExperts) -> None:
        self._layers[experts.layer] = experts

    def copies(self, layer: int) -> bool:
        """Whether this backend keeps a host copy of `layer`'s experts of its own: never."""
        return False

    def submit(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        experts = self._layers[layer]
        self._pairs = torch.zeros(*ids.shape, hidden.shape[1])
        for index in torch.unique(ids[ids >= 0]).tolist():
            parts = (matrix.data[index] for matrix in experts.matrices)
            _add_pairs(experts, index, parts, hidden, ids, weights, self._pairs)

    def is_done(self) -> bool:
        return True

    def wait(self) -> torch.Tensor:
        return self._pairs


class TorchReferenceGpu:
    """Reads experts from slots, on whatever device the slots are."""

    name = "torch_reference"
    answers_pairs = True
    finds_routed = True

    def __init__(self) -> None:
        self._layers: dict[int, tuple[LayerExperts, SlotLayout, torch.Tensor]] = {}

    def refuses(self, experts: LayerExperts) -> str | None:
        return None

    def add_layer(self, experts: LayerExperts, layout: SlotLayout, memory: torch.Tensor) -> None:
        self._layers[experts.layer] = experts, layout, memory

    def prepare(self, max_tokens: int) -> None:
        """Nothing to allocate: every expert is dequantised into memory of its own."""

    def launch(
        self,
        layer: int,
        slots: Sequence[tuple[int, int]],
        slot_of: torch.Tensor,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Write the pairs of the experts in `slots`; whoever computes a pair computes the same bits."""
        experts, layout, memory = self._layers[layer]
        told = slot_of.tolist()
        for index, slot in slots:
            if told[index] != slot or not 0 <= slot < len(memory):
                raise KernelError(f"layer {layer}: expert {index} is said to be in slots {slot} and {told[index]}")
            parts = (matrix.read(memory[slot]) for matrix in layout.matrices)
            _add_pairs(experts, index, parts, hidden.float(), ids, weights, out)
