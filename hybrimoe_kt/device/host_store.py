"""The host's copy of every routed expert, and who owns it.

The file's mapping holds them all; whoever opened the file owns it, and the views here keep it alive. CPU kernels
read the mapping in place. Beside it there is at most one copy of an expert, owned by exactly one of:

- this store, after `page_lock`: in slot layout and page-locked, so that a transfer is one copy by the device;
- the CPU backend, for layers whose width it must pad. The store then makes none, transfers go through staging.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import torch

from hybrimoe_kt.core.types import ExpertId

from .accelerator import Accelerator
from .experts import ExpertParts, LayerExperts
from .layout import SlotLayout

__all__ = ["HostStore"]


class HostStore:
    """Every layer's experts, by layer number, and how they will lie in slots."""

    def __init__(self) -> None:
        self.layers: dict[int, LayerExperts] = {}
        self.layouts: dict[int, SlotLayout] = {}
        self._copies: dict[int, torch.Tensor] = {}
        self._locks: dict[int, list[object]] = {}
        """Layer -> what keeps its part of the mapping page-locked; given back with the store."""

    def add(self, experts: LayerExperts) -> None:
        self.layers[experts.layer] = experts
        self.layouts[experts.layer] = SlotLayout(experts)

    def parts(self, expert: ExpertId) -> ExpertParts:
        """Return the expert's tensors' bytes in GGUF order, uint8 views `[num_bytes]` of the mapping."""
        return self.layers[expert.layer].parts(expert.index)

    def is_copied(self, layer: int) -> bool:
        """Whether there is a page-locked copy of this layer in slot layout."""
        return layer in self._copies

    def page_locked(self, expert: ExpertId) -> torch.Tensor:
        """Return the expert as its slot will hold it, page-locked uint8 `[slot_bytes]`; its layer `is_copied`."""
        return self._copies[expert.layer][expert.index]

    def base(self, layer: int) -> torch.Tensor:
        """All experts of a layer that `is_copied`, page-locked uint8 `[num_experts, slot_bytes]`."""
        return self._copies[layer]

    def is_registered(self, layer: int) -> bool:
        """Whether devices may copy straight from this layer's part of the mapping (in GGUF order)."""
        return layer in self._locks

    def is_direct(self, layer: int) -> bool:
        """Whether devices copy this layer's experts from where they are, without staging."""
        return layer in self._copies or layer in self._locks

    def page_lock(
        self,
        accelerator: Accelerator,
        layers: Collection[int],
        progress: Callable[[Iterable[int]], Iterable[int]] = iter,
    ) -> None:
        """Copy `layers` once into page-locked memory in slot layout; CapacityError when the host refuses."""
        for layer in progress(sorted(layers)):
            experts, layout = self.layers[layer], self.layouts[layer]
            memory = accelerator.page_locked(experts.num_experts * layout.slot_bytes)
            copy = memory.view(experts.num_experts, layout.slot_bytes)
            for index in range(experts.num_experts):
                layout.write(self.parts(ExpertId(layer, index)), copy[index])
            self._copies[layer] = copy

    def register(self, accelerator: Accelerator, layers: Collection[int]) -> bool:
        """Page-lock the mapping of `layers` in place; False where the driver does not allow it.

        What was locked of a layer that is refused is given back.
        """
        for layer in sorted(layers):
            locks: list[object] = []
            for matrix in self.layers[layer].tensors.values():
                lock = accelerator.register(matrix.data)
                if lock is None:
                    break
                locks.append(lock)
            else:
                self._locks[layer] = locks
        return self._locks.keys() >= set(layers)

    @property
    def num_bytes(self) -> int:
        """Bytes of all routed experts in the file."""
        return sum(layer.expert_bytes * layer.num_experts for layer in self.layers.values())

    @property
    def copied_bytes(self) -> int:
        """Host memory this store owns beside the mapping."""
        return sum(copy.numel() for copy in self._copies.values())
