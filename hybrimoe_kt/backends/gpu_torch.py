"""GPU experts in plain torch: an expert is dequantised, multiplied and forgotten. For machines without Triton."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hybrimoe_kt.device.experts import LayerExperts
from hybrimoe_kt.device.layout import SlotLayout
from hybrimoe_kt.errors import KernelError

from .dequantize import dequantize
from .torch_reference import expert_ffn

__all__ = ["TorchGpu"]


class TorchGpu:
    """Adds weighted sums. Every expert of a launch computes every token, those not routed to it with weight 0.

    That needs no count of the tokens on the host, so nothing waits for the device; dequantising an expert costs more
    than the tokens wasted on it. Reads every type that `dequantize` does.
    """

    name = "torch"
    answers_pairs = False
    finds_routed = False

    def __init__(self) -> None:
        self._layers: dict[int, tuple[LayerExperts, SlotLayout, torch.Tensor]] = {}

    def refuses(self, experts: LayerExperts) -> str | None:
        return None

    def add_layer(self, experts: LayerExperts, layout: SlotLayout, memory: torch.Tensor) -> None:
        self._layers[experts.layer] = experts, layout, memory

    def prepare(self, max_tokens: int) -> None:
        """Nothing: torch's own allocator keeps what the calls need."""

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
        """Enqueue the experts of `slots`; see `GpuBackend.launch`."""
        _, _, memory = self._layers[layer]
        for expert, slot in slots:
            if not 0 <= slot < memory.shape[0]:
                raise KernelError(f"expert {expert} of layer {layer} is said to be in slot {slot} of {memory.shape[0]}")
        x = hidden.float()
        for expert, slot in slots:
            weight = torch.where(ids == expert, weights, 0.0).sum(dim=1, keepdim=True)  # [T, 1]
            answer = expert_ffn(x, *self._matrices(layer, slot))
            out += torch.where(weight != 0, weight * answer, 0.0)

    def _matrices(self, layer: int, slot: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Dequantise gate, up `[inter, H]` and down `[H, inter]` of a slot."""
        _, layout, memory = self._layers[layer]
        gate, up, down = (
            dequantize(matrix.read(memory[slot]), matrix.type.number, (matrix.rows, matrix.columns))
            for matrix in layout.matrices
        )
        return gate, up, down
