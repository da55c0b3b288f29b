"""GPU experts in plain torch: an expert is dequantised from its slot, multiplied and forgotten."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from hybrimoe_kt.device.backend import GpuBackend, Routed
from hybrimoe_kt.device.experts import LayerExperts
from hybrimoe_kt.device.layout import SlotLayout
from hybrimoe_kt.device.step_graph import opaque
from hybrimoe_kt.errors import KernelError

from .torch_reference import add_pairs, expert_answer

__all__ = ["TorchGpu", "TorchReferenceGpu"]


class TorchGpu(GpuBackend):
    """Adds weighted sums. Every expert of a launch computes every token, those not routed to it with weight 0.

    That needs no count of the tokens on the host, so nothing waits for the device; dequantising an expert costs more
    than the tokens wasted on it. Reads every type that `dequantize` does. For machines without Triton.
    """

    name = "torch"
    answers_pairs = False
    finds_routed = False

    def __init__(self) -> None:
        self._layers: dict[int, tuple[LayerExperts, SlotLayout, torch.Tensor]] = {}

    @classmethod
    def planned_bytes(cls, experts: LayerExperts, max_tokens: int, capability: tuple[int, int] | str) -> int:
        """One expert's matrices in float32, twice while they are dequantised, and what a call has of it."""
        matrices = 2 * 3 * experts.hidden * experts.inter
        return 4 * (matrices + max_tokens * (3 * experts.inter + 3 * experts.hidden))

    def add_layer(self, experts: LayerExperts, layout: SlotLayout, memory: torch.Tensor) -> None:
        self._layers[experts.layer] = experts, layout, memory

    def launch(
        self, layer: int, slots: Sequence[tuple[int, int]], slot_of: torch.Tensor, routed: Routed, out: torch.Tensor
    ) -> None:
        """Enqueue the experts of `slots`; see `GpuBackend.launch`."""
        self._check(layer, slots, slot_of, self._layers[layer][2].shape[0])
        self._compute(layer, slots, routed, out)

    def _compute(self, layer: int, slots: Iterable[tuple[int, int]], routed: Routed, out: torch.Tensor) -> None:
        experts, layout, memory = self._layers[layer]
        routed = routed._replace(hidden=routed.hidden.float())
        for expert, slot in slots:
            parts = (matrix.read(memory[slot]) for matrix in layout.matrices)
            self._add(experts, expert, parts, routed, out)

    def _check(self, layer: int, slots: Sequence[tuple[int, int]], slot_of: torch.Tensor, num_slots: int) -> None:
        for expert, slot in slots:
            if not 0 <= slot < num_slots:
                raise KernelError(f"expert {expert} of layer {layer} is said to be in slot {slot} of {num_slots}")

    def _add(
        self, experts: LayerExperts, index: int, parts: Iterable[torch.Tensor], routed: Routed, out: torch.Tensor
    ) -> None:
        weight = torch.where(routed.ids == index, routed.weights, 0.0).sum(dim=1, keepdim=True)  # [T, 1]
        answer = expert_answer(experts, parts, routed.hidden)
        out += torch.where(weight != 0, weight * answer, 0.0)


class TorchReferenceGpu(TorchGpu):
    """Writes pairs; whoever computes a pair computes the same bits. Counts tokens on the host, which waits for them.

    It looks at the table when it runs, as a kernel does, so that a captured launch of it is proof.
    """

    name = "torch_reference"
    answers_pairs = True
    finds_routed = True
    decides_on_device = True

    def launch(
        self, layer: int, slots: Sequence[tuple[int, int]], slot_of: torch.Tensor, routed: Routed, out: torch.Tensor
    ) -> None:
        self._check(layer, slots, slot_of, self._layers[layer][2].shape[0])

        def by_table() -> None:
            held = [(expert, slot) for expert, slot in enumerate(slot_of.tolist()) if slot >= 0]
            self._compute(layer, held, routed, out)

        opaque(by_table)

    def _check(self, layer: int, slots: Sequence[tuple[int, int]], slot_of: torch.Tensor, num_slots: int) -> None:
        super()._check(layer, slots, slot_of, num_slots)
        told = slot_of.tolist()
        for expert, slot in slots:
            if told[expert] != slot:
                raise KernelError(f"layer {layer}: expert {expert} is said to be in slots {slot} and {told[expert]}")

    _add = staticmethod(add_pairs)
