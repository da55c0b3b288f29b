"""One thread that computes graphs while others go on: it holds the interpreter's lock between them only."""

from __future__ import annotations

import atexit
import queue
import threading
import weakref
from collections.abc import Callable

__all__ = ["Worker"]

_AWAITED_S = 10.0
"""At most, at the interpreter's end, for what a thread computes then."""


class Worker:
    """Runs what it is given, one thing after the other; what fails comes out of `join`. Its thread ends with it."""

    def __init__(self, name: str) -> None:
        self._thread = _Thread(name=name, daemon=True)
        weakref.finalize(self, self._thread.given.put, None)

    def start(self, work: Callable[[], None]) -> None:
        """Begin at once; what was given before has ended."""
        if self._thread.ident is None:
            self._thread.start()
        self._thread.ended.clear()
        self._thread.given.put(work)

    def is_done(self) -> bool:
        return self._thread.ended.is_set()

    def join(self) -> None:
        """Wait until it has ended; raises what it raised."""
        self._thread.ended.wait()
        failure, self._thread.failure = self._thread.failure, None
        if failure is not None:
            raise failure


class _Thread(threading.Thread):
    """Runs what is `given` until that is None; holds nothing of its worker."""

    def __init__(self, name: str, daemon: bool) -> None:
        super().__init__(name=name, daemon=daemon)
        self.given: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.ended = threading.Event()
        self.ended.set()
        self.failure: BaseException | None = None

    def run(self) -> None:
        while (work := self.given.get()) is not None:
            try:
                work()
            except BaseException as failure:  # handed to whoever waits
                self.failure = failure
            del work  # nothing of a step is kept alive until the next
            self.ended.set()


@atexit.register
def _end_threads() -> None:
    """Wait for what is computed: the interpreter's end takes the memory away, and the process with it."""
    for thread in threading.enumerate():
        if isinstance(thread, _Thread):
            thread.given.put(None)
            thread.join(_AWAITED_S)
