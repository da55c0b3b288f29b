"""What a way to wait promises, and the trial of one: a tiny graph that has to wait for the host, and then to go on."""

from __future__ import annotations

import time
from typing import Protocol

import torch

from hybrimoe_kt.device.accelerator import Accelerator, Event, Stream
from hybrimoe_kt.device.step_graph import CaptureError, StepGraph
from hybrimoe_kt.device.waiting import Deadline
from hybrimoe_kt.errors import DeadlineError, HybriMoEError, first_line

from .words import SharePosts

__all__ = ["StreamWait", "StreamWaits", "probe"]

_ENDS_WITHIN_S = 1.0
_HOLDS_S = 5e-3
_kept: list[object] = []
"""What a stream that did not end may still use."""


class StreamWait(Protocol):
    """A way to wait, made for one set of words. Kept alive as long as anything captured with it is."""

    name: str

    def wait(self, stream: Stream, place: int) -> None:
        """Enqueue on `stream`, which may be capturing: what follows begins once `done[place] == 1`.

        KernelError where the driver refuses.
        """


class StreamWaits(Protocol):
    """One of the ways."""

    name: str

    def unusable(self, accelerator: Accelerator) -> str | None:
        """Why it does not work on this device, None where a probe shows that it does; takes some seconds at most."""

    def on(self, accelerator: Accelerator, posts: SharePosts) -> StreamWait:
        """The wait for these words."""


def probe(accelerator: Accelerator, way: StreamWaits) -> str | None:
    """Capture a wait for a word on a stream of its own; return why what is replayed is no wait, None if it is one.

    A stream that does not end stays with its memory, and whoever waits for all of the device waits for ever.
    """
    capture = accelerator.capture()
    if capture is None:
        return f"nothing captures what {accelerator.name} does"
    posts = SharePosts(accelerator, (0,), hidden=1, hidden_dtype=torch.float32, top_k=1, answers_pairs=False)
    stream, event = accelerator.stream("trial of a wait"), accelerator.event()
    graphs: list[StepGraph] = []
    try:
        wait = way.on(accelerator, posts)

        def capturing() -> None:
            wait.wait(accelerator.compute, 0)  # the word is there; kernels are built before anything is captured
            posts.clear_done(0)
            capture.begin()
            try:
                wait.wait(accelerator.compute, 0)
            except BaseException:
                capture.abort()
                raise
            graphs.append(capture.end())

        def replaying() -> None:
            posts.clear_done(0)
            graphs[0].replay()

        for work in (capturing, replaying):
            accelerator.launch(stream, work, reads=(), writes=(posts.done,), site="trial of a wait")
            stream.record(event, "trial of a wait")
            if reason := _holds_and_ends(event, posts):
                _kept.append((posts, wait, graphs, stream, event))
                return reason
    except (HybriMoEError, CaptureError, RuntimeError, OSError, AttributeError, TypeError) as error:
        _kept.append((posts, graphs, stream, event))
        return first_line(error)
    return None


def _holds_and_ends(event: Event, posts: SharePosts) -> str | None:
    """Whether the stream stands until the word is set, and then comes to its end."""
    time.sleep(_HOLDS_S)
    if event.is_done():
        return "the stream went on before the word was there"
    posts.set_done(0)
    try:
        Deadline(_ENDS_WITHIN_S).wait(event.is_done, "the stream")
    except DeadlineError:
        return f"the stream did not go on within {_ENDS_WITHIN_S:g} s of the word"
    return "the wait ended itself and not by the word" if posts.has_timed_out else None
