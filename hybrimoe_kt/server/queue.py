"""Several answers at once: requests wait in the order they came, up to a limit, and a thread steps those that run."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from hybrimoe_kt.engine.answer import BegunAnswer, Request
from hybrimoe_kt.engine.events import Event, Finished, TextDelta

from .engine import Engine
from .errors import ApiError

__all__ = ["AnswerQueue", "Job", "Listener"]

logger = logging.getLogger(__name__)


class Listener(Protocol):
    """Who counts what a queue does; called on its thread."""

    def count_answer(self, finished: Finished) -> None:
        """An answer has ended without an error."""

    def count_first_token(self, seconds: float) -> None:
        """So long after its request an answer's first text has come."""

    def count_step(self, num_answers: int) -> None:
        """A step was made with so many answers begun."""


class Job:
    """Requests on their way, told one after the other as if they were one, however they are computed.

    `emit` gets their events on the queue's thread: `Finished` at the end of each, or an exception, which is the last.
    """

    def __init__(
        self, requests: Sequence[Request], emit: Callable[[Event | Exception], None], client: str = ""
    ) -> None:
        """`client` is who asks, for limits of each."""
        self.requests, self.emit, self.client = requests, emit, client
        self.stop = threading.Event()
        self.asked_s = time.perf_counter()
        self.begun: list[BegunAnswer] = []
        self._held: list[list[Event]] = [[] for _ in requests]
        """Events of answers that are not the next one to be told."""
        self._told = 0

    @property
    def has_more(self) -> bool:
        """Whether some of its requests have not begun."""
        return len(self.begun) < len(self.requests)

    @property
    def num_running(self) -> int:
        """Answers that have begun and not ended."""
        return sum(not answer.is_over for answer in self.begun)

    @property
    def is_told(self) -> bool:
        """Whether the end of the last answer has been told."""
        return self._told == len(self.requests)

    def tell(self, number: int, event: Event) -> list[Event]:
        """Take an event of the answer `number`; return what can be told now."""
        self._held[number].append(event)
        told: list[Event] = []
        while not self.is_told:
            held, self._held[self._told] = self._held[self._told], []
            told += held
            if not (held and isinstance(held[-1], Finished)):
                break
            self._told += 1
        return told


class AnswerQueue:
    """Owns the engine once started. Every method may be called from any thread."""

    def __init__(self, engine: Engine, max_waiting: int, listener: Listener, *, max_per_client: int = 0) -> None:
        """`max_waiting` requests wait for those that run; `max_per_client` wait or run, 0: as many as one likes."""
        self._engine, self.max_waiting, self._listener = engine, max_waiting, listener
        self._max_per_client = max_per_client
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._changed = threading.Condition()
        self._is_closed = False
        self._mean_s = 5.0
        self._thread = threading.Thread(target=self._work, name="answers", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def parallel(self) -> int:
        """Answers that may run at once."""
        return self._engine.parallel

    @property
    def num_active(self) -> int:
        """Requests of which an answer has begun."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_current_tokens(self) -> int:
        """Tokens of answers that have not ended."""
        return sum(run["new_tokens"] for run in self._runs())

    def tokens_per_s(self) -> float:
        """Of all answers being given together; 0 where none tells."""
        return float(sum(run["decode_tokens_per_s"] for run in self._runs()))

    def _runs(self) -> list[Mapping[str, Any]]:
        return [answer.numbers() for job in list(self._running) for answer in list(job.begun) if not answer.is_over]

    def submit(self, job: Job) -> None:
        """Let `job` wait for its turn; ApiError 429 when too many do, 503 after `close`."""
        with self._changed:
            if self._is_closed:
                raise shutting_down()
            room = max(0, self.parallel - sum(each.num_running for each in self._running))
            if len(self._waiting) >= self.max_waiting + room:
                raise self._come_back(
                    f"{len(self._waiting)} requests are waiting already, the limit is {self.max_waiting}; try later",
                    "queue_full",
                )
            own = sum(each.client == job.client for each in (*self._waiting, *self._running))
            if self._max_per_client and own >= self._max_per_client:
                raise self._come_back(
                    f"{own} requests of this client are waiting or being answered already, which is the limit of each",
                    "client_limit",
                )
            self._waiting.append(job)
            self._changed.notify_all()

    def _come_back(self, message: str, code: str) -> ApiError:
        wait_s = self._mean_s * (1 + len(self._waiting) // self.parallel)
        headers = {"Retry-After": str(min(60, math.ceil(wait_s)))}
        return ApiError(429, message, kind="rate_limit_error", code=code, headers=headers)

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
            waiting, running = list(self._waiting), list(self._running)
            self._waiting.clear()
        for job in (*waiting, *running):
            job.stop.set()
        for job in waiting:
            job.emit(shutting_down())
        with self._changed:
            self._changed.wait_for(self._is_idle, 5.0)
        return False

    def _is_idle(self) -> bool:
        return not self._running and not self._waiting

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._running or self._is_closed)
                if self._is_idle():
                    return
                self._admit()
            for job in list(self._running):
                self._begin(job)
            self._listener.count_step(self._num_answers)
            try:
                self._engine.step()
            except Exception as error:
                logger.exception("a step failed")
                for job in list(self._running):
                    self._end(job, error)
            for job in list(self._running):
                self._tell(job)

    @property
    def _num_answers(self) -> int:
        return sum(job.num_running for job in self._running)

    def _admit(self) -> None:
        """Let jobs run while there is room for one more answer."""
        wanted = sum(len(job.requests) - len(job.begun) + job.num_running for job in self._running)
        while self._waiting and wanted < self.parallel:
            job = self._waiting.popleft()
            self._running.append(job)
            wanted += len(job.requests)

    def _begin(self, job: Job) -> None:
        """Begin as many of its answers as there is room for."""
        try:
            while job.has_more and not job.stop.is_set() and self._num_answers < self.parallel:
                job.begun.append(BegunAnswer(self._engine, job.requests[len(job.begun)], job.stop))
        except Exception as error:
            logger.exception("an answer failed")
            self._end(job, error)

    def _tell(self, job: Job) -> None:
        """Tell what the last step has brought."""
        try:
            for number, answer in enumerate(job.begun):
                if answer.is_over:
                    continue
                for event in answer.events():
                    if isinstance(event, TextDelta | Finished) and not answer.has_told:
                        answer.has_told = True
                        self._listener.count_first_token(time.perf_counter() - job.asked_s)
                    if isinstance(event, Finished):
                        self._listener.count_answer(event)
                        if event.reason == "cancelled":
                            self._end(job, event)
                            return
                    told = job.tell(number, event)
                    for one in told[:-1]:
                        job.emit(one)
                    if job.is_told:
                        self._end(job, told[-1])
                        return
                    for one in told[-1:]:
                        job.emit(one)
            if job.stop.is_set() and job.has_more and not job.num_running:
                self._end(job, Finished("cancelled"))
        except Exception as error:
            logger.exception("an answer failed")
            self._end(job, error)

    def _end(self, job: Job, last: Event | Exception) -> None:
        for answer in job.begun:
            answer.leave()
        self._mean_s += 0.2 * (time.perf_counter() - job.asked_s - self._mean_s)
        with self._changed:  # before its client can ask again
            if job not in self._running:
                return  # it has ended, and whoever was told of it has failed
            self._running.remove(job)
            self._changed.notify_all()
        job.emit(last)


def shutting_down() -> ApiError:
    """The refusal of a server that is about to end."""
    return ApiError(
        503, "the server is shutting down", kind="server_error", code="shutting_down", headers={"Retry-After": "30"}
    )
