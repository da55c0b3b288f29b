"""Which expert of a launch is in which slot, as the kernels read it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .accelerator import Accelerator

__all__ = ["SlotTables"]


class SlotTables:
    """Expert -> slot for each launch of a step, int32 `[num_experts]`, -1 where the launch does not compute it.

    Written anew in every step: its routing read has waited for everything on `compute` before.
    """

    def __init__(self, accelerator: Accelerator, num_experts: int) -> None:
        self._accelerator = accelerator
        shape = num_experts, num_experts  # at most one launch per expert
        num_bytes = num_experts * num_experts * 4
        self._host = accelerator.page_locked(num_bytes).view(torch.int32).view(shape)
        self._device = accelerator.allocate(num_bytes).view(torch.int32).view(shape)
        values: Any = self._host.numpy().reshape(-1)
        nothing: Any = np.full(num_experts, -1, dtype=np.int32)  # numpy's stubs know no buffers before Python 3.12
        self._values = memoryview(values)
        """The same as plain numbers, which are quicker to write one by one."""
        self._nothing = memoryview(nothing)
        self._num_experts = num_experts
        self._rows = list(self._device)
        self._pairs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        """Number of tables -> the first so many of them, on the host and on the device."""
        self._kept: list[torch.Tensor] = []

    def send_one(self, slot_of: Sequence[int]) -> torch.Tensor:
        """Copy one table, expert -> slot, to memory of its own on the device, and keep its source."""
        num_bytes = 4 * self._num_experts
        source = self._accelerator.page_locked(num_bytes).view(torch.int32)
        target = self._accelerator.allocate(num_bytes).view(torch.int32)
        self._accelerator.on_host("fill slot tables", writes=(source,))
        source.fill_(-1)[: len(slot_of)].copy_(torch.tensor(slot_of, dtype=torch.int32))
        self._accelerator.copy(self._accelerator.compute, target, source, "slot tables to device")
        self._kept.append(source)
        return target

    def send(self, groups: Sequence[Sequence[tuple[int, int]]]) -> list[torch.Tensor]:
        """Copy one table per group to the device; returns them there."""
        num = len(groups)
        known = self._pairs.get(num)
        if known is None:
            known = self._pairs[num] = self._host[:num], self._device[:num]
        source, target = known
        self._accelerator.on_host("fill slot tables", writes=(source,))
        values, num_experts = self._values, self._num_experts
        for row, pairs in enumerate(groups):
            first = row * num_experts
            values[first : first + num_experts] = self._nothing
            for expert, slot in pairs:
                values[first + expert] = slot
        self._accelerator.copy(self._accelerator.compute, target, source, "slot tables to device")
        return self._rows[:num]
