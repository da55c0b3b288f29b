"""Slots: fixed accelerator storage, one expert each, and how many of them a budget buys."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

from hybrimoe_kt.core.memory_plan import slots_for
from hybrimoe_kt.errors import CapacityError
from hybrimoe_kt.sizes import CacheSize

from .accelerator import Accelerator, Event
from .host_store import HostStore
from .layout import SlotLayout

__all__ = ["LayerSlots", "SlotPool", "buffer_key", "slots_per_layer"]

logger = logging.getLogger(__name__)


def slots_per_layer(
    size: CacheSize,
    store: HostStore,
    accelerator: Accelerator,
    layers: Mapping[int, SlotLayout] | None = None,
    *,
    auto_bytes: int | None = None,
) -> dict[int, int]:
    """Return layer -> number of slots for what the user asked; CapacityError when it exceeds the device's memory.

    Fractions and budgets are spread evenly over `layers` (default: all); a layer never gets more slots than experts.
    A slot costs its `slot_bytes`, alignment included. "auto" takes `auto_bytes`, None: what the device says.
    """
    layouts = store.layouts if layers is None else layers
    num_experts = {layer: store.layers[layer].num_experts for layer in layouts}
    largest = max(num_experts.values())
    if size.per_layer is not None and size.per_layer > largest:
        logger.warning("cache size %d is more than the %d experts of a layer; using all", size.per_layer, largest)
    left = accelerator.auto_budget_bytes(0) if auto_bytes is None else auto_bytes
    if size.per_layer is None and size.fraction is None:
        _check_budget(left if size.num_bytes is None else size.num_bytes, accelerator)
    slots = slots_for(size, {layer: layout.slot_bytes for layer, layout in layouts.items()}, num_experts, left)
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


class PrefillBuffer:
    """Memory that layers take turns in while a prompt is computed, and what orders one layer's use after another's."""

    __slots__ = ("memory", "read_done", "written_by")

    def __init__(self, accelerator: Accelerator, num_bytes: int) -> None:
        self.memory = accelerator.allocate(num_bytes)
        self.read_done: Event = accelerator.event()
        accelerator.compute.record(self.read_done, "readers")  # an allocator may hand out what `compute` still uses
        self.written_by: dict[str, Event] = {}
        """Channel -> recorded after its last copy into the buffer."""


class LayerSlots:
    """One layer's slots, `memory` uint8 `[num_slots, slot_bytes]`, and what orders reading and writing them.

    `read_done` is recorded after every launch that reads any of them, in two events that take turns by step:
    `read_before` is the step before's. `written[slot]` is recorded after the last copy into it.
    `unsettled` holds the slots that `compute` has not waited for since they were last written. `key` is the layer's
    number for the GPU backend; slots in a `PrefillBuffer` have one of their own.
    """

    __slots__ = (
        "buffer",
        "first",
        "key",
        "layout",
        "memory",
        "read_before",
        "read_done",
        "unsettled",
        "views",
        "written",
    )

    def __init__(
        self,
        accelerator: Accelerator,
        layer: int,
        layout: SlotLayout,
        num_slots: int,
        *,
        first: int = 0,
        buffer: PrefillBuffer | None = None,
    ) -> None:
        """`first` is the core's number of the first slot: buffer slots follow the layer's own."""
        self.layout, self.first, self.buffer = layout, first, buffer
        self.key = layer if buffer is None else buffer_key(layer)
        num_bytes = num_slots * layout.slot_bytes
        memory = accelerator.allocate(num_bytes) if buffer is None else buffer.memory[:num_bytes]
        self.memory = memory.view(num_slots, layout.slot_bytes)
        self.views = list(self.memory)
        self.read_done: Event = accelerator.event() if buffer is None else buffer.read_done
        self.read_before: Event = accelerator.event() if buffer is None else buffer.read_done
        if buffer is None:
            for event in (self.read_done, self.read_before):
                accelerator.compute.record(event, "readers")  # as for a buffer
        self.written: list[Event] = [accelerator.event() for _ in range(num_slots)]
        self.unsettled: set[int] = set()

    def begin_step(self) -> None:
        """What this step reads is marked apart from what the step before has read."""
        self.read_done, self.read_before = self.read_before, self.read_done


class SlotPool:
    """All slots of one accelerator: each layer's own, and those of two buffers that layers stream through."""

    def __init__(
        self,
        accelerator: Accelerator,
        layouts: Mapping[int, SlotLayout],
        slots: Mapping[int, int],
        num_buffer_slots: Mapping[int, int] | None = None,
    ) -> None:
        """`slots` maps layer -> number of slots; layers with none are left out, also of the streams."""
        self.accelerator, self._layouts = accelerator, layouts
        self.layers: dict[int, LayerSlots] = {
            layer: LayerSlots(accelerator, layer, layouts[layer], count) for layer, count in slots.items() if count
        }
        self.buffers = self._make_buffers(num_buffer_slots or {})
        self.num_slots = self._count()
        """Slots over all layers, without the streams'."""

    def _make_buffers(self, num_slots: Mapping[int, int]) -> dict[int, LayerSlots]:
        """Neighbouring layers get different buffers, so that one is filled while the other is read."""
        layers = [layer for layer in sorted(self.layers) if num_slots.get(layer)]
        if not layers:
            return {}
        num_bytes = max(num_slots[layer] * self.layers[layer].layout.slot_bytes for layer in layers)
        buffers = [PrefillBuffer(self.accelerator, num_bytes) for _ in range(min(2, len(layers)))]
        return {
            layer: LayerSlots(
                self.accelerator,
                layer,
                self.layers[layer].layout,
                num_slots[layer],
                first=len(self.layers[layer].views),
                buffer=buffers[place % 2],
            )
            for place, layer in enumerate(layers)
        }

    def locate(self, layer: int, slot: int) -> tuple[LayerSlots, int]:
        """Return where the core's `slot` of `layer` is, and its number there."""
        slots = self.layers[layer]
        if slot < len(slots.views):
            return slots, slot
        stream = self.buffers[layer]
        return stream, slot - stream.first

    @property
    def groups(self) -> list[tuple[int, LayerSlots]]:
        """Every layer's own slots and its buffer slots, with the layer's number."""
        return [*self.layers.items(), *self.buffers.items()]

    def resize(self, layer: int, num_slots: int) -> LayerSlots | None:
        """Replace a layer's slots by `num_slots` empty ones; None when that is none. All work on them has ended."""
        old = self.layers.pop(layer, None)
        if old is not None:
            self.accelerator.release(old.memory.view(-1))
        if num_slots:
            self.layers[layer] = LayerSlots(self.accelerator, layer, self._layouts[layer], num_slots)
            if layer in self.buffers:
                self.buffers[layer].first = num_slots
        self.num_slots = self._count()
        return self.layers.get(layer)

    def bytes_of(self, layer: int, slot: int) -> torch.Tensor:
        """The slot's memory, uint8 `[slot_bytes]`, see `SlotLayout`."""
        slots, place = self.locate(layer, slot)
        memory: torch.Tensor = slots.views[place]
        return memory

    def _count(self) -> int:
        return sum(len(slots.views) for slots in self.layers.values())

    @property
    def num_bytes(self) -> int:
        """Accelerator memory held by slots, without the streams'."""
        return sum(slots.memory.numel() for slots in self.layers.values())


def buffer_key(layer: int) -> int:
    """The number under which a GPU backend knows the buffer slots of `layer`; its own inverse."""
    return -1 - layer
