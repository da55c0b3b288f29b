"""What a captured step sends to the host of a layer: its router's choice, in one copy, always to the same place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .accelerator import Accelerator, Event
from .backend import Routed
from .step_graph import CapturedWork, StepCapture

__all__ = ["SentRouting"]


class SentRouting:
    """One layer's, of one token, or of one of each of several texts.

    Memory is taken when it is made; `send` is captured; `read` is for every replay. What is captured of the layer's own
    launches is kept here, as it is worth as long as this memory.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        routed: Routed,
        scores: torch.Tensor | None,
        number: torch.Tensor,
        guess_bytes: int,
    ) -> None:
        """As `routed` is, with int64 ids and float32 weights and `scores [num_experts]`, if these are wanted.

        `number` int64 `[1]`, on the device, tells one replay from the next: it follows what is sent.
        """
        given = _in_order(routed, scores)
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in given)
        self._packed, self.memory = accelerator.allocate(num_bytes), accelerator.page_locked(num_bytes)
        hidden, ids, weights = _views(self._packed, given)[:3]
        self.routed = Routed(hidden, ids, weights)
        """On the device: what a replay writes again."""
        self._hidden, ids, weights, *scored = _views(self.memory, given)
        self._scores = scored[0] if scored else None
        is_wide = self._hidden.dtype == torch.float32
        self.host = Routed(self._hidden if is_wide else torch.empty(self._hidden.shape), ids, weights)
        """float32, int64, float32, on the host, once they have been `read`."""
        self._number = number
        word = accelerator.page_locked(8).view(torch.int64)
        word.fill_(-1)
        plain: Any = word.numpy()  # numpy's stubs know no buffers before Python 3.12
        self._word, self._seen = word, memoryview(plain)
        self.expected = 0
        """The replay whose routing is waited for."""
        self.piece_done: Event = accelerator.event()
        """Recorded behind the piece that sends."""
        self._sees_writes = False
        self.resident: tuple[object, CapturedWork] | None = None
        """The launch of a plan's first group, and the slots that it reads."""
        self.joins: dict[tuple[bool, bool], CapturedWork] = {}
        """Which shares there are -> how they are added."""
        self.guess_memory = accelerator.allocate(guess_bytes), accelerator.page_locked(guess_bytes)
        """Where the gates write, and what that is copied to."""
        self.guessed: Event = accelerator.event()
        self.gates: CapturedWork | None = None
        self.guesses: Any = None
        """A view of them on the host, see `readback.Guesses`."""

    def send(self, routed: Routed, scores: torch.Tensor | None, capture: StepCapture) -> None:
        """Enqueue the copy to the host, of tensors that are in one piece each."""
        given = _in_order(routed, scores)
        torch.cat([tensor.view(-1).view(torch.uint8) for tensor in given], out=self._packed)
        self.memory.copy_(self._packed, non_blocking=True)
        self._word.copy_(self._number, non_blocking=True)
        self._sees_writes = capture.host_sees_writes

    def is_sent(self) -> bool:
        """Whether the routing of the replay `expected` is on the host; raises what the piece failed with, if it has.

        A device copies the number behind all else, so that the rest is there when it is. An event that a graph records
        in its middle would not do: until a replay comes there, it is done from the replay before.
        """
        if self._sees_writes and self._seen[0] == self.expected:
            return True
        return self.piece_done.is_done()

    def read(self) -> list[float] | None:
        """Have `host` be what was sent; return the scores as plain numbers."""
        if self.host.hidden is not self._hidden:
            self.host.hidden.copy_(self._hidden)
        return None if self._scores is None else self._scores.tolist()


def _in_order(routed: Routed, scores: torch.Tensor | None) -> list[torch.Tensor]:
    """Each begins where its type may; kernels want hidden states, whose rows are whole 16 bytes, at such a place."""
    return [routed.hidden, routed.ids, routed.weights, *([] if scores is None else [scores])]


def _views(memory: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors of these shapes and types, one behind the other."""
    views, at = [], 0
    for tensor in like:
        end = at + tensor.numel() * tensor.element_size()
        views.append(memory[at:end].view(tensor.dtype).view(tensor.shape))
        at = end
    return views
