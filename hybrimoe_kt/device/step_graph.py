"""What a step enqueues, captured once and replayed: device work without the Python that asked for it.

A captured piece does again exactly what it did, with what its tensors hold by then. Whatever Python decided while it
was captured - a shape, an address, a number - is part of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from hybrimoe_kt.errors import HybriMoEError, first_line

__all__ = ["CaptureError", "CapturedWork", "StepCapture", "StepGraph", "StepLost", "opaque"]

logger = logging.getLogger(__name__)


class CaptureError(HybriMoEError):
    """A step cannot be captured; the message says what stands in the way."""


class StepLost(HybriMoEError):
    """Something that a captured step enqueued has failed after the host had gone on: all of the step is in doubt."""


class StepGraph(Protocol):
    """A captured piece."""

    def replay(self) -> object:
        """Enqueue all of it once more, on the current stream; never waits."""


class StepCapture(Protocol):
    """Captures one piece after the other on the current stream, which is not the device's default one.

    What lives from one piece to the next stays where it is, so pieces are replayed in the order of their capture.
    """

    host_sees_writes: bool
    """Whether the host sees in page-locked memory what a replay has written there, while the piece still runs."""

    def begin(self) -> None:
        """Capture what is enqueued from now on; CaptureError where that cannot be."""

    def end(self) -> StepGraph:
        """End the piece and return it; it has been enqueued once. CaptureError for what cannot be replayed."""

    def abort(self) -> None:
        """Forget the piece that was begun, if one was: something in it has failed."""


class CapturedWork:
    """Work that is captured when it is called for the second time, and replayed from then on.

    The first time kernels may have to be built and loaded, which no capture allows. Where it is refused, the work is
    done anew each time.
    """

    __slots__ = ("_capture", "_graph", "_is_warm", "work")

    def __init__(self, capture: StepCapture, work: Callable[[], object]) -> None:
        self._capture: StepCapture | None = capture
        self.work = work
        self._is_warm = False
        self._graph: StepGraph | None = None

    def renew(self, work: Callable[[], object]) -> None:
        """Take another work that enqueues the same, while it is asked for; what it holds is let go of afterwards."""
        if self._graph is None:
            self.work = work

    def __call__(self) -> None:
        if self._graph is not None:
            self._graph.replay()
        elif self._is_warm and self._capture is not None:
            self._graph = self._captured(self._capture)
            if self._graph is not None:
                self.work = _nothing
        else:
            self.work()
            self._is_warm = True

    def _captured(self, capture: StepCapture) -> StepGraph | None:
        try:
            capture.begin()
            try:
                self.work()
            except BaseException:
                capture.abort()
                raise
            return capture.end()
        except (CaptureError, RuntimeError) as refused:  # the latter as a driver does; what is broken fails again
            logger.info("enqueued kernel by kernel: %s", first_line(refused))
            self._capture = None
            self.work()
            return None


def _nothing() -> None:
    """In place of work that a graph does now."""


class _Listener(Protocol):
    def note(self, work: Callable[[], object]) -> None: ...


listeners: list[_Listener] = []
"""Who records just now, the innermost last."""


def opaque(work: Callable[[], object]) -> None:
    """Do `work`, which launches kernels that torch's dispatcher does not see, or reads on a CPU what a kernel would.

    It is one unit to whoever records a step: called again at every replay, with whatever the tensors it was made with
    hold by then. It returns nothing, keeps their shapes and places, and decides nothing else.
    """
    if listeners:
        listeners[-1].note(work)
    else:
        work()
