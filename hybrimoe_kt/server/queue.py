"""One answer at a time: requests wait in the order they came, up to a limit, and a thread answers them."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from hybrimoe_kt.engine.answer import Request, answer
from hybrimoe_kt.engine.events import Event, Finished

from .engine import Engine
from .errors import ApiError

__all__ = ["AnswerQueue", "Job"]

logger = logging.getLogger(__name__)


class Job:
    """Requests on their way, answered one after the other as if they were one.

    `emit` gets their events on the queue's thread: `Finished` at the end of each, or an exception, which is the last.
    """

    def __init__(self, requests: Sequence[Request], emit: Callable[[Event | Exception], None]) -> None:
        self.requests, self.emit = requests, emit
        self.stop = threading.Event()


class AnswerQueue:
    """Owns the engine once started. Every method may be called from any thread."""

    def __init__(self, engine: Engine, max_waiting: int, on_finished: Callable[[Finished], None]) -> None:
        """`on_finished` is told of every answer that ended without an error, on the queue's thread."""
        self._engine, self.max_waiting, self._on_finished = engine, max_waiting, on_finished
        self._waiting: deque[Job] = deque()
        self._active: Job | None = None
        self._changed = threading.Condition()
        self._is_closed = False
        self._mean_s = 5.0
        self._thread = threading.Thread(target=self._work, name="answers", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def num_active(self) -> int:
        return int(self._active is not None)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def submit(self, job: Job) -> None:
        """Let `job` wait for its turn; ApiError 429 when too many do, 503 after `close`."""
        with self._changed:
            if self._is_closed:
                raise shutting_down()
            if len(self._waiting) >= self.max_waiting + (self._active is None):
                raise ApiError(
                    429,
                    f"{len(self._waiting)} requests are waiting already, the limit is {self.max_waiting}; try later",
                    kind="rate_limit_error",
                    code="queue_full",
                    headers={"Retry-After": str(min(60, math.ceil(self._mean_s)))},
                )
            self._waiting.append(job)
            self._changed.notify_all()

    def cancel(self, job: Job) -> None:
        """End `job`: at once if it waits, after the current step if it is being answered. Its events end or not."""
        job.stop.set()
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
                self._changed.notify_all()

    def close(self, deadline_s: float) -> bool:
        """Take no more, and wait for what was taken; past the deadline that is cut short, and False returned."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            if self._changed.wait_for(self._is_idle, deadline_s):
                return True
            left = [*self._waiting, *([self._active] if self._active else [])]
            self._waiting.clear()
        for job in left:
            job.stop.set()
            if job is not self._active:
                job.emit(shutting_down())
        with self._changed:
            self._changed.wait_for(self._is_idle, 5.0)
        return False

    def _is_idle(self) -> bool:
        return self._active is None and not self._waiting

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_closed)
                if not self._waiting:
                    return
                self._active = self._waiting.popleft()
            self._answer(self._active)

    def _answer(self, job: Job) -> None:
        began = time.perf_counter()
        last: Event | Exception = Finished("cancelled")
        num_left = len(job.requests)
        try:
            for event in self._events(job):
                if isinstance(event, Finished):
                    self._on_finished(event)
                    num_left -= 1
                if num_left and not is_cancelled(event):
                    job.emit(event)
                else:
                    last = event
                    break
        except Exception as error:
            logger.exception("an answer failed")
            last = error
        self._mean_s += 0.2 * (time.perf_counter() - began - self._mean_s)
        with self._changed:  # before its client can ask again
            self._active = None
            self._changed.notify_all()
        job.emit(last)

    def _events(self, job: Job) -> Iterator[Event]:
        for request in job.requests:
            if job.stop.is_set():
                return
            yield from answer(self._engine, request, job.stop)


def is_cancelled(event: Event) -> bool:
    """Whether an answer ended because it was told to."""
    return isinstance(event, Finished) and event.reason == "cancelled"


def shutting_down() -> ApiError:
    """The refusal of a server that is about to end."""
    return ApiError(
        503, "the server is shutting down", kind="server_error", code="shutting_down", headers={"Retry-After": "30"}
    )
