"""Steps of layers whose every expert stands in a slot: launched at once, whatever was routed, and never waited for.

The table of slots is sent once. What was routed is counted on the device, and read when somebody asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from .inbox import Routed, Step

if TYPE_CHECKING:
    from .lane import Lane

__all__ = ["Counted", "WholeLayers"]

_NOTHING = torch.empty(0)


class Counted:
    """How often each expert of a layer was routed to since it was last asked, and the last token's choice."""

    __slots__ = ("counts", "last")

    def __init__(self, counts: list[int], last: list[int]) -> None:
        """`counts [num_experts]`; `last [top_k]`, empty when no token has been decoded on its own."""
        self.counts, self.last = counts, last


class WholeLayers:
    """Those of one lane."""

    def __init__(self, lane: Lane, num_experts: int) -> None:
        self._lane, self._num_experts = lane, num_experts
        self._tables: dict[int, tuple[list[int], list[tuple[int, int]], torch.Tensor]] = {}
        """Layer -> experts' slots, the same as pairs, and the table on the device."""
        self._place = {layer: place for place, layer in enumerate(lane.layers)}
        self._counts: torch.Tensor | None = None
        """On the device, int64 `[num_layers, num_experts]`."""
        self._rows: list[torch.Tensor] = []
        self._last: dict[int, torch.Tensor] = {}
        self._read: list[list[int]] = []
        self._ones = _NOTHING

    def run(self, layer: int, slot_of: Sequence[int], routed: Routed) -> torch.Tensor:
        """Enqueue a step, its experts in the slots `slot_of`; returns `[num_tokens, hidden]` as `Lane.finish` does."""
        lane = self._lane
        weights = lane.widened(routed.weights)
        step = Step(routed.hidden.contiguous(), routed.ids.contiguous(), weights, _NOTHING, _NOTHING, _NOTHING)
        slots = lane.pool.layers[layer]
        for place in sorted(slots.unsettled):
            lane.queue.settle(layer, place)
        slots.begin_step()
        pairs, table = self._table(layer, slot_of)
        lane.launch_all(layer, slots, pairs, table, step)
        self._count(layer, step.ids)
        return lane.finish(step, None, has_gpu=True)

    def routed(self) -> dict[int, Counted]:
        """What was routed in each layer since the last call. Waits for what is under way."""
        if self._counts is None:
            return {}
        found, counts = {}, self._counts.tolist()
        for place, layer in enumerate(self._lane.layers):
            if layer in self._tables:
                last = self._last.get(layer)
                changes = [now - then for now, then in zip(counts[place], self._read[place], strict=True)]
                found[layer] = Counted(changes, [] if last is None else last.tolist()[0])
        self._read = counts
        return found

    def _table(self, layer: int, slot_of: Sequence[int]) -> tuple[list[tuple[int, int]], torch.Tensor]:
        known = self._tables.get(layer)
        if known is None or known[0] != slot_of:
            pairs = list(enumerate(slot_of))
            known = self._tables[layer] = (list(slot_of), pairs, self._lane.send_table(slot_of))
        return known[1], known[2]

    def _count(self, layer: int, ids: torch.Tensor) -> None:
        """Count every expert of the step once, as hits are."""
        accelerator = self._lane.accelerator
        if self._counts is None:
            shape = len(self._place), self._num_experts
            whole = accelerator.allocate(8 * shape[0] * shape[1]).view(torch.int64).view(shape)
            accelerator.launch(accelerator.compute, whole.zero_, reads=(), writes=(whole,), site="clear counts")
            self._rows, self._read = list(whole), [[0] * shape[1] for _ in range(shape[0])]
            self._counts = whole
        counts = self._rows[self._place[layer]]
        if len(ids) == 1:
            self._last[layer] = ids
            if len(self._ones) != ids.shape[1]:
                self._ones = torch.ones_like(ids[0])
        ones = self._ones

        def work() -> None:
            if len(ids) == 1:
                counts.index_add_(0, ids[0], ones)
            else:
                counts.add_(torch.zeros_like(counts).index_fill_(0, ids.flatten(), 1))

        accelerator.launch(accelerator.compute, work, reads=(ids,), writes=(counts,), site="count")
