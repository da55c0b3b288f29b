"""The memory through which a stream asks the host for its share of a layer, without the host being called.

One model has one set of it, page-locked, seen by host and device alike: `asked` and `done`, a word a layer; an inbox
with what is to be computed; an outbox with the answer. One inbox is enough, as a layer is asked for only after the
stream has waited for the one before, and so is one outbox. A layer's word stands at its `place`.

Who writes what, and when:

1. The *device*, in stream order and in one kernel, at a layer of which something is the CPU's: writes the inbox;
   `done[place] = 0`; then, as a release at system scope, `asked[place] = 1`. Where nothing is the CPU's it writes only
   `done[place] = 1`, so that the stream does not wait; inbox and `asked` it leaves alone.
2. The *host*, seeing `asked[place] == 1`: reads the inbox, computes, writes the outbox; `asked[place] = 0`; then
   `done[place] = 1`.
3. The *stream* waits until `done[place] == 1` and copies the outbox; where nothing was asked its user ignores that.
4. While no token is under way the *host* may set every `asked` to 0 and every `done` to 1.

Each word has one writer at a time: `asked` is the device's while 0 and the host's while 1, `done` the reverse. When a
token is released (see `service`) the host sets `done` though it is not its turn: waits end early then, answers mean
nothing, and the token is given up. `timed_out` is written by a wait that ended itself, and by the host between tokens.

Ordering. The device's release lets the host see the inbox, and `done[place] == 0`, once it sees `asked[place] == 1`.
The host's stores become visible in the order given: x86-64 does so by itself, elsewhere `fence` stands between them,
and between reading a word and what it announces. What the stream does behind a wait begins after the word was seen.
The host reads and writes words whole, 4 aligned bytes at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from hybrimoe_kt.device.accelerator import Accelerator

__all__ = ["SharePosts", "fence", "naive_post"]

_LINE = 128
"""Bytes that no two parts share, so that neither side's polling takes away what the other writes."""
_turn = threading.Lock()


def fence() -> None:
    """Order this thread's reads and writes before it and behind it.

    Giving a lock back is a release, which what comes before does not pass; taking one is an acquire, which what comes
    behind does not pass; and the second does not pass the first. Less than a microsecond.
    """
    with _turn:
        pass
    with _turn:
        pass


class SharePosts:
    """Memory for the shares of `layers`, by their numbers in the model; see the module.

    `asked` and `done` int32 `[num_layers]`, `timed_out` int32 `[1]`; the inbox `hidden` `[hidden]`, `ids` int64
    `[top_k]` with -1 for what is not the CPU's, and `weights` float32 `[top_k]`; `outbox` float32 `[hidden]`, or
    `[top_k, hidden]` for a backend that answers pairs. All on the host. CapacityError where they cannot be page-locked.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        layers: Sequence[int],
        *,
        hidden: int,
        hidden_dtype: torch.dtype,
        top_k: int,
        answers_pairs: bool,
    ) -> None:
        self.layers, self.answers_pairs = tuple(layers), answers_pairs
        self.place = {layer: place for place, layer in enumerate(self.layers)}
        """Layer -> where its words stand."""
        words, answer = (len(self.layers),), (top_k, hidden) if answers_pairs else (hidden,)
        shapes: tuple[tuple[tuple[int, ...], torch.dtype], ...] = (
            (words, torch.int32),
            (words, torch.int32),
            ((1,), torch.int32),
            ((hidden,), hidden_dtype),
            ((top_k,), torch.int64),
            ((top_k,), torch.float32),
            (answer, torch.float32),
        )
        sizes = [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in shapes]
        ends = [0]
        for size in sizes:
            ends.append(ends[-1] + -(-size // _LINE) * _LINE)
        self.memory = accelerator.page_locked(ends[-1] + _LINE)
        """All of it, kept alive by every part."""
        self.memory.zero_()
        first = -self.memory.data_ptr() % _LINE
        self.asked, self.done, self.timed_out, self.hidden, self.ids, self.weights, self.outbox = (
            self.memory[first + at : first + at + size].view(dtype).view(shape)
            for at, size, (shape, dtype) in zip(ends, sizes, shapes, strict=False)
        )
        self._asked, self._done, self._timed_out = (
            words.numpy().data for words in (self.asked, self.done, self.timed_out)
        )
        self._ids, self._weights = self.ids.numpy().data, self.weights.numpy().data
        self._asked_bytes = self._asked.cast("B")
        self.reset()

    # The host's side.

    def next_asked(self) -> int:
        """The first place that is asked for, -1 if none is. Its inbox may be read now."""
        at = self._asked_bytes.tobytes().find(1)
        if at < 0:
            return -1
        fence()
        return at // 4

    def read_inbox(self, hidden: torch.Tensor) -> tuple[list[int], Sequence[float]]:
        """What is asked: hidden states into `hidden`, float32 `[hidden]`; ids and weights as plain numbers."""
        hidden.copy_(self.hidden)
        return self._ids.tolist(), self._weights.tolist()

    def answer(self, place: int, answer: torch.Tensor | None) -> None:
        """Let the stream go on at `place` with an answer in the outbox's shape; zeros for None."""
        self.write_outbox(answer)
        self.clear_asked(place)
        fence()
        self.set_done(place)

    def write_outbox(self, answer: torch.Tensor | None) -> None:
        if answer is None:
            self.outbox.zero_()
        else:
            self.outbox.copy_(answer)

    def clear_asked(self, place: int) -> None:
        self._asked[place] = 0

    def set_done(self, place: int) -> None:
        self._done[place] = 1

    def is_done(self, place: int) -> bool:
        """Whether the stream may go on at `place`; the outbox may be read then."""
        if self._done[place] != 1:
            return False
        fence()
        return True

    def release(self) -> None:
        """End every wait that is under way; what the outbox holds means nothing then."""
        fence()
        for place in range(len(self.layers)):
            self.set_done(place)

    def reset(self) -> None:
        """Ask for nothing, wait for nothing; no token is under way."""
        for place in range(len(self.layers)):
            self._asked[place], self._done[place] = 0, 1
        self._timed_out[0] = 0

    @property
    def has_timed_out(self) -> bool:
        """Whether a wait ended itself since the last `reset`."""
        return bool(self._timed_out[0])

    def time_out(self) -> None:
        """End this wait and, until `reset`, all others at once."""
        self._timed_out[0] = 1

    # The device's side, in emulations.

    def write_inbox(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        self.hidden.copy_(hidden)
        self.ids.copy_(ids)
        self.weights.copy_(weights)

    def clear_done(self, place: int) -> None:
        self._done[place] = 0

    def set_asked(self, place: int) -> None:
        self._asked[place] = 1


def naive_post(posts: SharePosts, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
    """What a device's kernel does for a layer, on the host, as one unit of work: `step_graph.opaque` where recorded.

    `hidden [hidden]`, `ids [top_k]`, -1 for what is not the CPU's, `weights [top_k]`.
    """
    place = posts.place[layer]
    if not bool((ids >= 0).any()):
        posts.set_done(place)
        return
    posts.write_inbox(hidden, ids, weights)
    posts.clear_done(place)
    fence()
    posts.set_asked(place)
