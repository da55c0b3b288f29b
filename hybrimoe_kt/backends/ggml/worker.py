"""One thread that computes graphs while others go on: it holds the interpreter's lock between them only."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

__all__ = ["Worker"]


class Worker:
    """Runs what it is given, one thing after the other; what fails comes out of `join`."""

    def __init__(self, name: str) -> None:
        self._given: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._name = name
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()
        self._ended.set()
        self._failure: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin at once; what was given before has ended."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        self._ended.clear()
        self._given.put(work)

    def is_done(self) -> bool:
        return self._ended.is_set()

    def join(self) -> None:
        """Wait until it has ended; raises what it raised."""
        self._ended.wait()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _run(self) -> None:
        while True:
            work = self._given.get()
            try:
                work()
            except BaseException as failure:  # handed to whoever waits
                self._failure = failure
            del work  # nothing of a step is kept alive until the next
            self._ended.set()
