"""The worst scheduler that keeps the rules: every queue advances at random, held back by event edges alone.

Work is cut into steps, and steps of different queues interleave: a copy first poisons its target, then brings one
half, then the other. Nothing runs because the host asks for it to be enqueued; it runs some time before the host
learns that it is done.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .races import Clock, RaceDetector

__all__ = ["Adversary", "Mark", "Queue"]

_LAZINESS = (0.0, 0.3, 0.8, 1.0)


@dataclass(eq=False, slots=True)
class Mark:
    """One recording of an event: reached or not, the clock it carries, and what failed before it."""

    clock: Clock
    is_reached: bool = False
    error: Exception | None = None


@dataclass(eq=False, slots=True)
class _Work:
    steps: deque[Callable[[], object]]


@dataclass(eq=False, slots=True)
class Queue:
    """One participant's pending work, first in, first out."""

    who: int
    name: str
    pending: deque[_Work | tuple[str, Any]] = field(default_factory=deque)
    weight: float = 1.0
    error: Exception | None = None
    is_stalled: bool = False

    def is_runnable(self) -> bool:
        if not self.pending or self.is_stalled:
            return False
        head = self.pending[0]
        return isinstance(head, _Work) or head[0] != "wait" or head[1].is_reached


class Adversary:
    """All queues of all emulated devices, one seed, one race detector.

    `ignore` names a site whose waits are left out, as if its line were deleted from the program: what a test does
    to show that the line is needed.
    """

    def __init__(self, seed: int, *, ignore: str | None = None) -> None:
        self.random = random.Random(seed)
        self.ignore = ignore
        self.ignored = 0
        self.detector = RaceDetector()
        self.host = self.detector.participant("host")
        self.queues: list[Queue] = []
        self._reported: list[Exception] = []
        self._laziness = self.random.choice(_LAZINESS)

    def queue(self, name: str) -> Queue:
        """Add a queue; some are much slower than others."""
        queue = Queue(self.detector.participant(name), name, weight=self.random.choice((0.02, 0.3, 1.0, 1.0)))
        self.queues.append(queue)
        return queue

    def submit(self, queue: Queue, steps: Sequence[Callable[[], object]]) -> Clock:
        """Append work; return the clock at which it happens."""
        clock = self._enter(queue)
        queue.pending.append(_Work(deque(steps)))
        self._advance()
        return clock

    def record(self, queue: Queue) -> Mark:
        """Append a mark."""
        mark = Mark(self._enter(queue))
        queue.pending.append(("record", mark))
        self._advance()
        return mark

    def wait(self, queue: Queue, mark: Mark | None, site: str) -> None:
        """Hold `queue` back until `mark`."""
        if mark is None or self._is_ignored(site):
            return
        self._enter(queue)
        self.detector.merge(queue.who, mark.clock)
        queue.pending.append(("wait", mark) if mark.error not in self._reported else ("known", mark))
        self._advance()

    def host_sees(self, mark: Mark | None, site: str) -> bool:
        """Let things happen for a while; whether `mark` is reached. What failed before it is raised, once."""
        if mark is None or self._is_ignored(site):
            return True
        for _ in range(self.random.choice((1, 4, 16))):
            if mark.is_reached or not self.step():
                break
        if mark.is_reached:
            self.detector.merge(self.host, mark.clock)
            if mark.error is not None:
                self._report(mark.error)
                raise mark.error
        return mark.is_reached

    def on_host(self, site: str, reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor]) -> None:
        """Book what the host touches."""
        self.detector.access(self.host, self.detector.tick(self.host), site, reads, writes)

    def step(self) -> bool:
        """Do one step of one queue that may go on; False if none may."""
        runnable = [queue for queue in self.queues if queue.is_runnable()]
        if not runnable:
            return False
        queue = self.random.choices(runnable, [queue.weight for queue in runnable])[0]
        head = queue.pending[0]
        if isinstance(head, _Work):
            try:
                if head.steps:
                    head.steps.popleft()()
            except Exception as error:  # reported as hardware does: to whoever waits for a later mark
                queue.error = error
                head.steps.clear()
            if not head.steps:
                queue.pending.popleft()
            return True
        queue.pending.popleft()
        kind, what = head
        if kind == "record":
            what.is_reached, what.error = True, queue.error
        elif kind == "wait":  # whoever waits for something that failed has failed too
            queue.error = queue.error or what.error
        elif kind == "reported" and queue.error is what:
            queue.error = None
        return True

    def _report(self, error: Exception) -> None:
        """The host knows of `error`: what is enqueued from now on does not carry it any more."""
        if error not in self._reported:
            self._reported.append(error)
            for queue in self.queues:
                queue.pending.append(("reported", error))

    def _enter(self, queue: Queue) -> Clock:
        self.detector.merge(queue.who, self.detector.tick(self.host))
        return self.detector.tick(queue.who)

    def _advance(self) -> None:
        while self.random.random() > self._laziness and self.step():
            pass

    def _is_ignored(self, site: str) -> bool:
        if site != self.ignore:
            return False
        self.ignored += 1
        return True
