"""What a captured step sends to the host of a layer: its router's choice, in one copy, always to the same place."""

from __future__ import annotations

from typing import Any

import torch

from .accelerator import Accelerator, Event
from .backend import Routed
from .step_graph import CapturedWork, StepCapture

__all__ = ["SentRouting"]


class SentRouting:
    """One layer's, of one token. Memory is taken when it is made; `send` is captured; `read` is for every replay."""

    def __init__(self, accelerator: Accelerator, routed: Routed, scores: torch.Tensor | None, guess_bytes: int) -> None:
        """As `routed` is, with int64 ids and float32 weights and `scores [num_experts]`, if these are wanted."""
        self._made_of = [(tensor.shape, tensor.dtype) for tensor in _in_order(routed, scores)]
        num_bytes = sum(shape.numel() * dtype.itemsize for shape, dtype in self._made_of)
        self._packed, self.memory = accelerator.allocate(num_bytes), accelerator.page_locked(num_bytes)
        ids, weights, *scored, self._hidden = self._views()
        self._scores = scored[0] if scored else None
        is_wide = self._hidden.dtype == torch.float32
        self.host = Routed(self._hidden if is_wide else torch.empty(self._hidden.shape), ids, weights)
        """float32, int64, float32, on the host, once they have been `read`."""
        self.routed = routed
        """On the device: what a replay writes again."""
        self.sent: Event = accelerator.marked_event()
        self.is_marked = False
        """Whether a replay records `sent` by itself."""
        self.guess_memory = accelerator.allocate(guess_bytes), accelerator.page_locked(guess_bytes)
        """Where the gates write, and what that is copied to."""
        self.guessed: Event = accelerator.event()
        self.gates: CapturedWork | None = None
        self.guesses: Any = None
        """A view of them on the host, see `readback.Guesses`."""

    def _views(self) -> list[torch.Tensor]:
        views, at = [], 0
        for shape, dtype in self._made_of:
            end = at + shape.numel() * dtype.itemsize
            views.append(self.memory[at:end].view(dtype).view(shape))
            at = end
        return views

    def send(self, routed: Routed, scores: torch.Tensor | None, capture: StepCapture) -> None:
        """Enqueue the copy to the host, of tensors that are in one piece each."""
        given = _in_order(routed, scores)
        assert [(tensor.shape, tensor.dtype) for tensor in given] == self._made_of, "made for these"
        torch.cat([tensor.view(-1).view(torch.uint8) for tensor in given], out=self._packed)
        self.memory.copy_(self._packed, non_blocking=True)
        self.routed, self.is_marked = routed, capture.mark(self.sent)

    def read(self) -> list[float] | None:
        """Have `host` be what was sent; return the scores as plain numbers."""
        if self.host.hidden is not self._hidden:
            self.host.hidden.copy_(self._hidden)
        return None if self._scores is None else self._scores.tolist()


def _in_order(routed: Routed, scores: torch.Tensor | None) -> list[torch.Tensor]:
    """The widest numbers first, so that each begins where its type may."""
    return [routed.ids, routed.weights, *([] if scores is None else [scores]), routed.hidden]
