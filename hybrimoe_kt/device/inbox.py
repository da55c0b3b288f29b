"""What the host must read of every step: the router's choice, and what the gates guess of the next layers.

Whoever decides on the host must know what was routed, so waiting for that cannot be avoided: it is the one wait of a
layer on the accelerator's path, everything else only enqueues. All copies go to page-locked buffers and are in flight
together. The guesses are enqueued behind the routing and picked up after the experts have been launched, when they
have long arrived. Two sets of buffers take turns, so that a set is not written again while the CPU experts of the
step before may still be reading it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .accelerator import Accelerator, Event
from .waiting import Patience

__all__ = ["Guess", "Inbox", "Predict", "Step"]

Guess = tuple[int, torch.Tensor, torch.Tensor]
"""A later layer, the ids `[num_tokens, top_k]` its gate would choose, its mean probabilities `[num_experts]`."""
Predict = Callable[[torch.Tensor], Sequence[Guess]]
"""From the hidden states entering a MoE layer to guesses for the layers after it, nearest first; only enqueues."""
MAX_GUESSES = 3


@dataclass(slots=True)
class Step:
    """One layer step: what the model handed over, and the same on the host.

    On the model's device `hidden [num_tokens, hidden]` in the model's dtype, `ids` int64 and `weights` float32
    `[num_tokens, top_k]`; `host_*` are float32, int64, float32 on the host, valid until the step after next.
    `scores` are the router's probabilities averaged over the tokens, `[num_experts]`; `guesses` are on the host once
    `guessed` is done.
    """

    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    host_hidden: torch.Tensor
    host_ids: torch.Tensor
    host_weights: torch.Tensor
    scores: list[float] | None = None
    guesses: Sequence[Guess] = ()
    guessed: Event | None = None

    @classmethod
    def on_host(
        cls, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, scores: torch.Tensor | None
    ) -> Step:
        """Read with plain copies; waits for the device as long as it takes. Makes no guesses."""
        host_hidden = hidden.to(device="cpu", dtype=torch.float32).contiguous()
        host_ids, host_weights = ids.to("cpu").contiguous(), weights.to(device="cpu", dtype=torch.float32).contiguous()
        listed = None if scores is None else scores.tolist()
        return cls(hidden, ids, weights.float(), host_hidden, host_ids, host_weights, listed)


class Inbox:
    """Two sets of page-locked buffers for steps of up to `max_tokens` tokens."""

    def __init__(
        self,
        accelerator: Accelerator,
        *,
        max_tokens: int,
        hidden: int,
        top_k: int,
        num_experts: int,
        patience: Patience,
    ) -> None:
        self._accelerator, self._patience = accelerator, patience
        routed, scored = max_tokens * top_k * 8, num_experts * 4
        sizes = (max_tokens * hidden * 4, routed, max_tokens * top_k * 4, scored, *(routed, scored) * MAX_GUESSES)
        self._sets = [[accelerator.page_locked(size) for size in sizes] for _ in range(2)]
        self._events = [(accelerator.event(), accelerator.event()) for _ in range(2)]
        self._turn = 0

    def read(
        self,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        scores: torch.Tensor | None,
        predict: Predict | None,
    ) -> Step:
        """Bring one step to the host; `weights` float32, `scores` float32 `[num_experts]` if there are any."""
        self._turn ^= 1
        buffers, (read, guessed) = self._sets[self._turn], self._events[self._turn]
        tensors = (hidden, ids, weights) if scores is None else (hidden, ids, weights, scores)
        views = [self._copy(buffer, tensor) for buffer, tensor in zip(buffers, tensors, strict=False)]
        self._accelerator.compute.record(read, "routing read")
        guesses: list[Guess] = []
        if predict is not None:
            for number, (layer, chosen, probabilities) in enumerate(predict(hidden)):
                place = 4 + 2 * number
                guesses.append(
                    (layer, self._copy(buffers[place], chosen), self._copy(buffers[place + 1], probabilities))
                )
            self._accelerator.compute.record(guessed, "guesses read")
        self._patience.wait(read.is_done, f"the router's choice on {self._accelerator.name}")
        self._accelerator.on_host("planning", reads=views)
        listed = views[3].tolist() if scores is not None else None
        return Step(hidden, ids, weights, views[0].float(), views[1], views[2], listed, guesses, guessed)

    def wait_guesses(self, step: Step) -> Sequence[Guess]:
        """Return the step's guesses once they are on the host."""
        if step.guesses and step.guessed is not None:
            self._patience.wait(step.guessed.is_done, f"the gates' guesses on {self._accelerator.name}")
            self._accelerator.on_host("prefetching", reads=[part for guess in step.guesses for part in guess[1:]])
        return step.guesses

    def _copy(self, buffer: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        view = buffer[: tensor.numel() * tensor.element_size()].view(tensor.dtype).view(tensor.shape)
        self._accelerator.copy(self._accelerator.compute, view, tensor, "routing to host")
        return view
