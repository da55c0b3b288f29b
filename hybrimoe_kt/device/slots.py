"""Slots: fixed accelerator storage, one expert each, and how many of them a budget buys."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

from hybrimoe_kt.config import CacheSize
from hybrimoe_kt.errors import CapacityError

from .accelerator import Accelerator, Event
from .host_store import HostStore
from .layout import SlotLayout

__all__ = ["SlotPool", "slots_per_layer"]

logger = logging.getLogger(__name__)


def slots_per_layer(
    size: CacheSize, store: HostStore, accelerator: Accelerator, layers: Mapping[int, SlotLayout] | None = None
) -> dict[int, int]:
    """Return layer -> number of slots for what the user asked; CapacityError when it exceeds the device's memory.

    Fractions and budgets are spread evenly over `layers` (default: all); a layer never gets more slots than experts.
    A slot costs its `slot_bytes`, alignment included.
    """
    layouts = store.layouts if layers is None else layers
    if size.per_layer is not None:
        wanted = dict.fromkeys(layouts, size.per_layer)
        largest = max(store.layers[layer].num_experts for layer in layouts)
        if size.per_layer > largest:
            logger.warning("cache size %d is more than the %d experts of a layer; using all", size.per_layer, largest)
    elif size.fraction is not None:
        wanted = {layer: round(size.fraction * store.layers[layer].num_experts) for layer in layouts}
    else:
        budget = size.num_bytes if size.num_bytes is not None else accelerator.auto_budget_bytes()
        _check_budget(budget, accelerator)
        one_each = sum(layout.slot_bytes for layout in layouts.values())
        wanted = dict.fromkeys(layouts, budget // one_each if one_each else 0)
    slots = {layer: min(count, store.layers[layer].num_experts) for layer, count in wanted.items()}
    _check_fits(slots, layouts, accelerator)
    return slots


def _check_budget(budget: int, accelerator: Accelerator) -> None:
    free = accelerator.free_bytes()
    if budget > free:
        raise CapacityError(
            f"a cache_size of {budget / 1e9:.2f} GB was asked for, {accelerator.name} has {free / 1e9:.2f} GB free; "
            f"give a smaller cache_size, or auto"
        )


def _check_fits(slots: Mapping[int, int], layouts: Mapping[int, SlotLayout], accelerator: Accelerator) -> None:
    needed = sum(count * layouts[layer].slot_bytes for layer, count in slots.items())
    free = accelerator.free_bytes()
    if needed > free:
        raise CapacityError(
            f"the expert cache needs {needed / 1e9:.2f} GB, {accelerator.name} has {free / 1e9:.2f} GB free; "
            f"give a smaller cache_size, or auto"
        )


class LayerSlots:
    """One layer's slots, `memory` uint8 `[num_slots, slot_bytes]`, and what orders reading and writing them.

    `read_done` is recorded after every launch that reads any of them; `written[slot]` after the last copy into it.
    `unsettled` holds the slots that `compute` has not waited for since they were last written.
    """

    __slots__ = ("layout", "memory", "read_done", "unsettled", "views", "written")

    def __init__(self, accelerator: Accelerator, layout: SlotLayout, num_slots: int) -> None:
        self.layout = layout
        memory = accelerator.allocate(num_slots * layout.slot_bytes)
        self.memory = memory.view(num_slots, layout.slot_bytes)
        self.views = list(self.memory)
        self.read_done: Event = accelerator.event()
        self.written: list[Event] = [accelerator.event() for _ in range(num_slots)]
        self.unsettled: set[int] = set()


class SlotPool:
    """All slots of one accelerator."""

    def __init__(self, accelerator: Accelerator, layouts: Mapping[int, SlotLayout], slots: Mapping[int, int]) -> None:
        """`slots` maps layer -> number of slots; layers with none are left out."""
        self.accelerator = accelerator
        self.layers: dict[int, LayerSlots] = {
            layer: LayerSlots(accelerator, layouts[layer], count) for layer, count in slots.items() if count
        }
        self.num_slots = self._count()
        """Slots over all layers."""

    def resize(self, layer: int, num_slots: int) -> LayerSlots | None:
        """Replace a layer's slots by `num_slots` empty ones; None when that is none. All work on them has ended."""
        old = self.layers.pop(layer)
        self.accelerator.release(old.memory.view(-1))
        if num_slots:
            self.layers[layer] = LayerSlots(self.accelerator, old.layout, num_slots)
        self.num_slots = self._count()
        return self.layers.get(layer)

    def bytes_of(self, layer: int, slot: int) -> torch.Tensor:
        """The slot's memory, uint8 `[slot_bytes]`, see `SlotLayout`."""
        return self.layers[layer].memory[slot]

    def _count(self) -> int:
        return sum(len(slots.views) for slots in self.layers.values())

    @property
    def num_bytes(self) -> int:
        """Accelerator memory held."""
        return sum(slots.memory.numel() for slots in self.layers.values())
