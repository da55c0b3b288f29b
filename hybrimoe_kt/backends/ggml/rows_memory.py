"""What the graphs of all layers share in a step of several conversations, a token each: a row."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from .building import Region, Workspace
from .step_memory import num_seen

__all__ = ["RowsMemory"]

_LEAST_ROWS, _LEAST_SEEN = 4, 512
"""Rows, and positions of a mask, that there is memory for at least; doubled when more are wanted."""


class RowsMemory:
    """Of steps of any number of rows, which graphs of all of them share."""

    def __init__(self, hidden: int, workspace: Workspace) -> None:
        self.width, self.workspace, self.logits = hidden, workspace, Workspace()
        """`logits`: one row's, of all its heads."""
        self.hidden_region, self.positions = Region(torch.empty(0)), Region(torch.empty(0))
        self._num_rows = self._num_places = 0
        self._masks: dict[int, _Mask] = {}
        self._begins: list[int] = []
        self.seen: list[int] = []
        """How many tokens each row looks at."""
        self.most_seen = 0
        self._reserve(_LEAST_ROWS)

    @property
    def num(self) -> int:
        """Rows of this step."""
        return len(self._begins)

    @property
    def hidden(self) -> torch.Tensor:
        """Hidden states of this step, float32 `[rows, hidden]`."""
        return self._hidden

    def begin(self, positions: Sequence[int]) -> torch.Tensor:
        """Say at which position each row's token stands; return where hidden states are written, `[rows, hidden]`."""
        if len(positions) > self._num_rows:
            self._reserve(max(len(positions), 2 * self._num_rows))
        if len(positions) != len(self._begins):
            self._hidden = self.hidden_region.memory[: len(positions)]
        self._begins = list(positions)
        self._positions[: len(positions)] = positions
        self.seen = [num_seen(position + 1) for position in positions]
        self.most_seen = max(self.seen)
        for window, mask in self._masks.items():
            mask.write(self._begins, self.seen, self.most_seen, window)
        return self._hidden

    def masks(self, window: int) -> list[int]:
        """Address of what each row sees of its tokens, float16 `[seen]`: 0, or minus infinity."""
        found = self._masks.get(window)
        if found is None:
            found = self._masks[window] = _Mask()
            found.write(self._begins, self.seen, self.most_seen, window)
        return found.addresses

    def _reserve(self, num_rows: int) -> None:
        with torch.inference_mode(False):
            self.hidden_region.replace(torch.zeros(num_rows, self.width))
            self.positions.replace(torch.zeros(num_rows, dtype=torch.int32))
        self._hidden, self._positions = self.hidden_region.memory[:0], self.positions.memory.numpy()
        self._num_rows, self._begins = num_rows, []


class _Mask:
    """What rows see through one window."""

    def __init__(self) -> None:
        self._memory: npt.NDArray[np.float16] = np.empty((0, 0), dtype=np.float16)
        self.addresses: list[int] = []
        self._written: list[tuple[int, int]] = []
        """Of each row, where its token stands and what it looks at."""

    def write(self, begins: Sequence[int], seen: Sequence[int], most_seen: int, window: int) -> None:
        rows, places = self._memory.shape
        if len(begins) > rows or most_seen > places:
            rows = max(len(begins), _LEAST_ROWS if len(begins) <= rows else 2 * rows)
            places = max(places, _LEAST_SEEN if most_seen <= _LEAST_SEEN else 2 ** math.ceil(math.log2(most_seen)))
            self._memory = np.empty((rows, places), dtype=np.float16)
            self.addresses, self._written = [], []
        if len(self.addresses) != len(begins):
            first = self._memory.ctypes.data
            self.addresses = [first + 2 * places * row for row in range(len(begins))]
        wanted, written = list(zip(begins, seen, strict=True)), self._written
        for number, (begin, end) in enumerate(wanted):
            first = max(0, begin + 1 - window) if window else 0
            if number < len(written) and written[number] == (begin - 1, end):
                self._memory[number, begin] = 0
                if first:
                    self._memory[number, first - 1] = -math.inf
                continue
            row = self._memory[number]
            row[:end] = -math.inf
            row[first : begin + 1] = 0
        self._written = wanted + written[len(wanted) :]
