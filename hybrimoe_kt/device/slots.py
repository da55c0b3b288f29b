"""Slots: fixed accelerator storage, one expert each, and how many of them a budget buys."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

from hybrimoe_kt.config import CacheSize
from hybrimoe_kt.core.types import Transfer
from hybrimoe_kt.errors import CapacityError

from .accelerator import Accelerator
from .host_store import HostStore

__all__ = ["SlotPool", "slots_per_layer"]

logger = logging.getLogger(__name__)


def slots_per_layer(size: CacheSize, store: HostStore, accelerator: Accelerator) -> dict[int, int]:
    """Return layer -> number of slots for what the user asked; CapacityError when it exceeds the device's memory.

    Fractions and budgets are spread evenly over the layers; a layer never gets more slots than experts.
    """
    layers = store.layers
    if size.per_layer is not None:
        wanted = dict.fromkeys(layers, size.per_layer)
        largest = max(experts.num_experts for experts in layers.values())
        if size.per_layer > largest:
            logger.warning("cache size %d is more than the %d experts of a layer; using all", size.per_layer, largest)
    elif size.fraction is not None:
        wanted = {layer: round(size.fraction * experts.num_experts) for layer, experts in layers.items()}
    else:
        budget = size.num_bytes if size.num_bytes is not None else accelerator.auto_budget_bytes()
        _check_budget(budget, accelerator)
        wanted = _spread(budget, store)
    slots = {layer: min(count, layers[layer].num_experts) for layer, count in wanted.items()}
    _check_fits(slots, store, accelerator)
    return slots


def _spread(budget: int, store: HostStore) -> dict[int, int]:
    one_each = sum(experts.expert_bytes for experts in store.layers.values())
    per_layer = budget // one_each if one_each else 0
    return dict.fromkeys(store.layers, per_layer)


def _check_budget(budget: int, accelerator: Accelerator) -> None:
    free = accelerator.free_bytes()
    if budget > free:
        raise CapacityError(
            f"a cache_size of {budget / 1e9:.2f} GB was asked for, {accelerator.name} has {free / 1e9:.2f} GB free; "
            f"give a smaller cache_size, or auto"
        )


def _check_fits(slots: Mapping[int, int], store: HostStore, accelerator: Accelerator) -> None:
    needed = sum(count * store.layers[layer].expert_bytes for layer, count in slots.items())
    free = accelerator.free_bytes()
    if needed > free:
        raise CapacityError(
            f"the expert cache needs {needed / 1e9:.2f} GB, {accelerator.name} has {free / 1e9:.2f} GB free; "
            f"give a smaller cache_size, or auto"
        )


class SlotPool:
    """All slots of one accelerator: per layer one block of memory `[num_slots, expert_bytes]`."""

    def __init__(self, accelerator: Accelerator, store: HostStore, slots: Mapping[int, int]) -> None:
        self.accelerator, self._store = accelerator, store
        self._memory = {
            layer: accelerator.allocate(count * store.layers[layer].expert_bytes).view(count, -1)
            for layer, count in slots.items()
            if count
        }

    def bytes_of(self, layer: int, slot: int) -> torch.Tensor:
        """The slot's memory, uint8 `[expert_bytes]`: gate, up, down, without gaps."""
        return self._memory[layer][slot]

    def fill(self, transfer: Transfer) -> None:
        """Copy an expert's bytes into its slot."""
        target = self.bytes_of(transfer.expert.layer, transfer.slot)
        offset = 0
        for part in self._store.parts(transfer.expert):
            self.accelerator.copy(target[offset : offset + part.numel()], part)
            offset += part.numel()

    @property
    def num_slots(self) -> int:
        """Slots over all layers."""
        return sum(memory.shape[0] for memory in self._memory.values())

    @property
    def num_bytes(self) -> int:
        """Accelerator memory held."""
        return sum(memory.numel() for memory in self._memory.values())
