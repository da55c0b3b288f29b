"""What the host must read of every step: the router's choice, and what the gates guess of the next layers.

Whoever decides on the host must know what was routed, so waiting for that cannot be avoided: it is the one wait of a
layer on the accelerator's path, everything else only enqueues. All copies go to page-locked buffers and are in flight
together. The gates are asked once the experts have been launched, on a stream of their own: they hold up neither the
routing nor the experts, and their guesses are on the host when prefetches are chosen. Two sets of buffers take turns,
so that a set is not written again while the CPU experts of the step before may still be reading it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from .accelerator import Accelerator, Event
from .backend import Routed
from .sent_routing import SentRouting
from .step_graph import CapturedWork, StepCapture
from .waiting import Deadline

__all__ = ["Guesses", "Predict", "Readback", "Step", "ask", "on_host"]


class Guesses(NamedTuple):
    """What the gates of some later `layers` would choose, nearest first.

    `ids` int64 `[num_layers, num_tokens, top_k]`; `scores` float32 `[num_layers, num_experts]`, the probabilities
    averaged over the tokens; `rows` these as plain numbers, in the same memory, where that is the host's.
    """

    layers: Sequence[int]
    ids: torch.Tensor
    scores: torch.Tensor
    rows: Sequence[Sequence[float]] = ()


class Predict(Protocol):
    """Asks the gates of the `layers` after a MoE layer, nearest first, for which experts they would choose."""

    layers: Sequence[int]
    num_experts: int
    """Of each of these layers."""

    def __call__(self, hidden: torch.Tensor, ids: torch.Tensor, scores: torch.Tensor) -> None:
        """Write what the hidden states `[num_tokens, hidden]` entering the layer say to `ids` and `scores`.

        `ids` int64 `[num_layers, num_tokens, top_k]`, `scores` float32 `[num_layers, num_experts]`, all on the device
        of `hidden`; only enqueues, on the current stream.
        """


MAX_GUESSES = 3
_MAX_VIEWS = 256
"""Kept of one set: layers differ in how many follow them, prompts in length."""


def ask(predict: Predict, hidden: torch.Tensor, ids: torch.Tensor) -> Guesses:
    """Ask at once, into memory of its own; `ids` is the layer's own choice, whose shape the guesses take."""
    chosen = torch.empty(len(predict.layers), *ids.shape, dtype=torch.int64, device=hidden.device)
    scores = torch.empty(len(predict.layers), predict.num_experts, device=hidden.device)
    predict(hidden, chosen, scores)
    return Guesses(predict.layers, chosen, scores)


@dataclass(slots=True)
class Step:
    """One layer step: what the model handed over, weights in float32, and the same on the host.

    `host` is float32, int64, float32, valid until the step after next. `scores` are the router's probabilities
    averaged over the tokens, `[num_experts]`; `guesses` are on the host once `guessed` is done.
    """

    routed: Routed
    host: Routed
    scores: list[float] | None = None
    guesses: Guesses | None = None
    guessed: Event | None = None
    sent: SentRouting | None = None
    """Of a captured step: all of this stays where it is from token to token."""

    @classmethod
    def on_host(cls, routed: Routed, scores: torch.Tensor | None = None) -> Step:
        """Read with plain copies, see `on_host`. Makes no guesses."""
        routed = Routed(routed.hidden, routed.ids, routed.weights.float())
        return cls(routed, on_host(routed), None if scores is None else scores.tolist())


def on_host(routed: Routed) -> Routed:
    """A step with float32 hidden states and weights, all in one piece on the host; what is so already is no copy.

    Waits for the device as long as it takes.
    """
    hidden, ids, weights = routed[:3]
    if _is_plain(hidden) and _is_plain(weights) and ids.is_cpu and ids.is_contiguous():
        return routed
    hidden, weights = hidden.to("cpu", torch.float32), weights.to("cpu", torch.float32)
    return Routed(hidden.contiguous(), ids.cpu().contiguous(), weights.contiguous())


def _is_plain(floats: torch.Tensor) -> bool:
    return floats.is_cpu and floats.dtype is torch.float32 and floats.is_contiguous()


class _Set:
    """One set of buffers and their events; views into them are kept by what they were made for."""

    def __init__(self, accelerator: Accelerator, sizes: Sequence[int]) -> None:
        self._buffers = [accelerator.page_locked(size) for size in sizes]
        self._views: dict[tuple[torch.Size, torch.dtype, torch.Size, torch.Size], list[torch.Tensor]] = {}
        self.read, self.guessed = accelerator.event(), accelerator.event()

    def whole(self, place: int) -> torch.Tensor:
        """Buffer `place`, uint8."""
        return self._buffers[place]

    def views(self, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The buffers as hidden states, ids, weights and perhaps scores like these.

        Making them anew would cost more than all else of a read.
        """
        key = like[0].shape, like[0].dtype, like[1].shape, like[-1].shape
        known = self._views.get(key)
        if known is None:
            if len(self._views) >= _MAX_VIEWS:
                self._views.clear()
            known = self._views[key] = [
                buffer[: tensor.numel() * tensor.element_size()].view(tensor.dtype).view(tensor.shape)
                for buffer, tensor in zip(self._buffers, like, strict=False)
            ]
        return known


class _Room:
    """Memory for guesses of one shape, ids and behind them scores, so that one copy brings both."""

    def __init__(self, device: torch.Tensor, hosts: Sequence[torch.Tensor], shape: tuple[int, int, int, int]) -> None:
        """`shape` is number of layers, tokens, top-k, experts; memory uint8."""
        num_layers, num_tokens, top_k, num_experts = shape
        id_bytes = num_layers * num_tokens * top_k * 8
        num_bytes = id_bytes + num_layers * num_experts * 4

        def parts(memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            ids = memory[:id_bytes].view(torch.int64).view(num_layers, num_tokens, top_k)
            return ids, memory[id_bytes:num_bytes].view(torch.float32).view(num_layers, num_experts)

        self.source, self.on_device = device[:num_bytes], parts(device)
        self.targets = [host[:num_bytes] for host in hosts]
        self._on_host = [parts(host) for host in hosts]
        self._rows = [_plain_rows(scores) for _, scores in self._on_host]

    def guesses(self, layers: Sequence[int], turn: int) -> Guesses:
        """What has been, or will be, copied to the host in that turn."""
        return Guesses(layers, *self._on_host[turn], self._rows[turn])


def _plain_rows(scores: torch.Tensor) -> list[Sequence[float]]:
    """Every row of a tensor on the host, whose numbers cost a call of torch each otherwise."""
    rows: Any = scores.numpy()  # numpy's stubs know no buffers before Python 3.12
    return [memoryview(row) for row in rows]


class Readback:
    """Two sets of page-locked buffers for steps of up to `max_tokens` tokens."""

    def __init__(
        self,
        accelerator: Accelerator,
        *,
        max_tokens: int,
        hidden: int,
        top_k: int,
        num_experts: int,
        deadline: Deadline,
    ) -> None:
        self._accelerator, self._deadline = accelerator, deadline
        self._num_experts = num_experts
        routed, scored = max_tokens * top_k * 8, num_experts * 4
        guessed = (routed + scored) * MAX_GUESSES
        sizes = (max_tokens * hidden * 4, routed, max_tokens * top_k * 4, scored, guessed)
        self._sets = (_Set(accelerator, sizes), _Set(accelerator, sizes))
        self._guessed = accelerator.allocate(guessed)
        """Where the gates write, on the device; the host has waited for the last guesses before it asks for others."""
        self._rooms: dict[tuple[int, ...], _Room] = {}
        self.gates = accelerator.stream("gates")
        self._turn = 0
        self._captures_gates = accelerator.capture()
        self._router = f"the router's choice on {accelerator.name}"
        self._gates = f"the gates' guesses on {accelerator.name}"

    def read(self, routed: Routed, scores: torch.Tensor | None) -> Step:
        """Bring one step to the host; tensors in one piece, weights and `scores [num_experts]` float32."""
        self._turn ^= 1
        accelerator, buffers = self._accelerator, self._sets[self._turn]
        compute = accelerator.compute
        tensors = routed[:3] if scores is None else (*routed[:3], scores)
        views = buffers.views(tensors)
        for view, tensor in zip(views, tensors, strict=True):
            accelerator.copy(compute, view, tensor, "routing to host")
        compute.record(buffers.read, "routing read")
        if not buffers.read.is_done():
            self._deadline.wait(buffers.read.is_done, self._router)
        accelerator.on_host("planning", reads=views)
        listed = views[3].tolist() if scores is not None else None
        return Step(routed, Routed(views[0].float(), views[1], views[2]), listed)

    def sending(self, routed: Routed, scores: torch.Tensor | None, number: torch.Tensor) -> SentRouting:
        """Make what sends a layer's routing from within a captured step; see `SentRouting`."""
        guess_bytes = (routed.ids.numel() * 8 + self._num_experts * 4) * MAX_GUESSES
        return SentRouting(self._accelerator, routed, scores, number, guess_bytes)

    def take(self, sent: SentRouting) -> Step:
        """Wait for what a replay has sent."""
        if not sent.is_sent():
            self._deadline.wait(sent.is_sent, self._router)
        self._accelerator.on_host("planning", reads=(sent.memory,))
        scores = sent.read()
        return Step(sent.routed, sent.host, scores, sent=sent)

    def _ask_again(self, step: Step, sent: SentRouting, predict: Predict, capture: StepCapture) -> None:
        """Replay the gates, which are captured when they are first asked."""
        accelerator, gates = self._accelerator, self.gates
        source, target = sent.guess_memory
        hidden = step.routed.hidden
        if sent.gates is None:
            num_tokens, top_k = step.routed.ids.shape
            shape = len(predict.layers), num_tokens, top_k, predict.num_experts
            room = _Room(source, [target], shape)
            ids, scores = room.on_device

            def work() -> None:
                predict(hidden, ids, scores)
                room.targets[0].copy_(room.source, non_blocking=True)

            sent.gates, sent.guesses = CapturedWork(capture, work), room.guesses(predict.layers, 0)
        accelerator.launch(gates, sent.gates, reads=(hidden,), writes=(source, target), site="gates")
        gates.record(sent.guessed, "guesses read")
        step.guesses, step.guessed = sent.guesses, sent.guessed

    def ask(self, step: Step, predict: Predict) -> None:
        """Enqueue the gates and their guesses' way to the host, for the step read last."""
        if step.sent is not None and self._captures_gates is not None:
            self._ask_again(step, step.sent, predict, self._captures_gates)
            return
        accelerator, buffers, gates = self._accelerator, self._sets[self._turn], self.gates
        room = self._room_for(predict, step.routed.ids)
        ids, scores = room.on_device
        hidden = step.routed.hidden  # written by now: the host has waited for a copy of it

        def work() -> None:
            predict(hidden, ids, scores)

        accelerator.launch(gates, work, reads=(hidden,), writes=(room.source,), site="gates")
        accelerator.copy(gates, room.targets[self._turn], room.source, "guesses to host")
        gates.record(buffers.guessed, "guesses read")
        step.guesses, step.guessed = room.guesses(predict.layers, self._turn), buffers.guessed

    def _room_for(self, predict: Predict, ids: torch.Tensor) -> _Room:
        """Buffers shaped for the guesses; made again only when the shape changes."""
        num_tokens, top_k = ids.shape
        shape = len(predict.layers), num_tokens, top_k, predict.num_experts
        known = self._rooms.get(shape)
        if known is None:
            if len(self._rooms) >= _MAX_VIEWS:
                self._rooms.clear()
            known = self._rooms[shape] = _Room(self._guessed, [buffers.whole(4) for buffers in self._sets], shape)
        return known

    def wait_guesses(self, step: Step) -> Guesses | None:
        """Return the step's guesses once they are on the host."""
        if step.guesses is not None and step.guessed is not None:
            if not step.guessed.is_done():
                self._deadline.wait(step.guessed.is_done, self._gates)
            self._accelerator.on_host("prefetching", reads=step.guesses[1:3])
        return step.guesses
