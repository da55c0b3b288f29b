"""Steps of layers whose every expert stands in a slot: launched at once, whatever was routed, and never waited for.

The table of slots is sent once. What was routed is counted on the device, and read when somebody asks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .accelerator import Accelerator
from .slot_tables import SlotTables

__all__ = ["Counted", "WholeLayers"]


class Counted:
    """How often each expert of a layer was routed to since it was last asked, and the last token's choice."""

    __slots__ = ("counts", "last")

    def __init__(self, counts: list[int], last: list[int]) -> None:
        """`counts [num_experts]`; `last [top_k]`, empty when no token has been decoded on its own."""
        self.counts, self.last = counts, last


class WholeLayers:
    """Those of one accelerator: their tables of slots, and what was routed there."""

    def __init__(self, accelerator: Accelerator, layers: Sequence[int], num_experts: int, tables: SlotTables) -> None:
        self._accelerator, self._layers, self._num_experts = accelerator, layers, num_experts
        self._sender = tables
        self._tables: dict[int, tuple[list[int], list[tuple[int, int]], torch.Tensor]] = {}
        """Layer -> experts' slots, the same as pairs, and the table on the device."""
        self._place = {layer: place for place, layer in enumerate(layers)}
        self._counts: torch.Tensor | None = None
        """On the device, int64 `[num_layers, num_experts]`."""
        self._rows: list[torch.Tensor] = []
        self._last: dict[int, torch.Tensor] = {}
        self._read: list[list[int]] = []
        self._ones = torch.empty(0)

    def routed(self) -> dict[int, Counted]:
        """What was routed in each layer since the last call. Waits for what is under way."""
        if self._counts is None:
            return {}
        found, counts = {}, self._counts.tolist()
        for place, layer in enumerate(self._layers):
            if layer in self._tables:
                last = self._last.get(layer)
                changes = [now - then for now, then in zip(counts[place], self._read[place], strict=True)]
                found[layer] = Counted(changes, [] if last is None else last.tolist()[0])
        self._read = counts
        return found

    def table(self, layer: int, slot_of: Sequence[int]) -> tuple[list[tuple[int, int]], torch.Tensor]:
        """The layer's experts with their slots `slot_of`, as pairs and as a table on the device; sent once."""
        known = self._tables.get(layer)
        if known is None or known[0] != slot_of:
            pairs = list(enumerate(slot_of))
            known = self._tables[layer] = (list(slot_of), pairs, self._sender.send_one(slot_of))
        return known[1], known[2]

    def is_ready(self, layer: int, slot_of: Sequence[int]) -> bool:
        """Whether the layer's table is on the device, and counts are, so that nothing is made or sent for a step."""
        known = self._tables.get(layer)
        is_sent = known is not None and known[0] == slot_of
        return is_sent and self._counts is not None and len(self._ones) > 0

    def capture_count(self, layer: int, ids: torch.Tensor) -> None:
        """Count the experts of one token, within a step that is being captured; others have been counted before."""
        assert self._counts is not None, "the step before was not captured"
        self._last[layer] = ids
        self._rows[self._place[layer]].index_add_(0, ids[0], self._ones)

    def count(self, layer: int, ids: torch.Tensor) -> None:
        """Count every expert of the step once, as hits are."""
        accelerator = self._accelerator
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
