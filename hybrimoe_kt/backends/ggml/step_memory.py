"""What the graphs of all layers share in one step of a conversation, and what each leaves behind."""

from __future__ import annotations

import math
import weakref
from typing import NamedTuple

import torch

from .building import Region, Workspace
from .key_values import KeyValues
from .recurrent_state import RecurrentState

__all__ = ["DenseAnswer", "Held", "Output", "StepMemory", "answer_from", "num_seen"]

Held = KeyValues | RecurrentState
"""What a layer keeps of a conversation."""


def num_seen(length: int) -> int:
    """How many tokens' keys a graph looks at for a conversation of `length`: few sizes, 255 too many at most."""
    step = 128 if length <= 512 else 256
    return -(-length // step) * step


class StepMemory:
    """What the graphs of all layers read and write in one step of `tokens` tokens."""

    def __init__(self, tokens: int, hidden: int, workspace: Workspace) -> None:
        self.tokens, self.width, self.workspace = tokens, hidden, workspace
        with torch.inference_mode(False):  # memory that is written to in any mode
            self.hidden = torch.zeros(tokens, hidden)
            self._positions = torch.zeros(tokens, dtype=torch.int32)
        self.hidden_region, self.positions = Region(self.hidden), Region(self._positions)
        self._masks: weakref.WeakValueDictionary[tuple[int, int], Region] = weakref.WeakValueDictionary()
        """Of the graphs that there are."""
        self._begin = 0

    def begin(self, position: int, seen: int) -> None:
        """Say at which position the step's first token stands, and how many positions are looked at."""
        self._begin = position
        torch.arange(position, position + self.tokens, out=self._positions)
        for (size, window), mask in list(self._masks.items()):
            if size == seen:
                self._write(mask.memory, window)

    def mask(self, seen: int, window: int) -> Region:
        """What each token sees of `seen` positions: float16 `[tokens, seen]`, 0 or minus infinity."""
        found = self._masks.get((seen, window))
        if found is None:
            with torch.inference_mode(False):
                memory = torch.empty(self.tokens, seen, dtype=torch.float16)
            self._write(memory, window)
            found = self._masks[seen, window] = Region(memory)
        return found

    def _write(self, mask: torch.Tensor, window: int) -> None:
        if self.tokens == 1:
            mask.fill_(-math.inf)
            mask[0, max(0, self._begin + 1 - window) if window else 0 : self._begin + 1] = 0
            return
        places = torch.arange(mask.shape[1])
        own = torch.arange(self._begin, self._begin + self.tokens)[:, None]
        seen = places <= own
        if window:
            seen &= places > own - window
        mask.fill_(-math.inf).masked_fill_(seen, 0)


class DenseAnswer(NamedTuple):
    """What a layer's graph leaves for its experts, valid until the next graph runs."""

    residual: torch.Tensor
    """float32 `[tokens, hidden]`; the layer's answer itself where it has no experts."""
    normed: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    """The router's, float32 `[tokens, num_experts]`."""
    ids: torch.Tensor | None = None
    """int32 `[tokens, top_k]`, where the graph chooses."""
    weights: torch.Tensor | None = None


class Output(NamedTuple):
    """Where in the workspace one field of a `DenseAnswer` is."""

    name: str
    place: int
    width: int
    dtype: torch.dtype = torch.float32


def answer_from(workspace: Workspace, outputs: tuple[Output, ...], tokens: int) -> DenseAnswer:
    """What is there after a graph has run; the same each time, until the workspace grows."""
    key = outputs, tokens
    found: DenseAnswer | None = workspace.views.get(key)
    if found is None:
        view = workspace.view
        found = DenseAnswer(**{name: view(place, tokens, width, dtype=dtype) for name, place, width, dtype in outputs})
        workspace.views[key] = found
    return found
