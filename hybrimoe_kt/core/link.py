"""The virtual link of one accelerator: first in, first out, with a queue whose tail may be aborted."""

from __future__ import annotations

from collections.abc import Callable

from .types import Transfer


class Queued:
    """A transfer with its predicted times on the link."""

    __slots__ = ("duration_s", "end_s", "start_s", "transfer")

    def __init__(self, transfer: Transfer, start_s: float, duration_s: float) -> None:
        self.transfer = transfer
        self.start_s = start_s
        self.duration_s = duration_s
        self.end_s = start_s + duration_s


class Link:
    """What has been put on one link and when it will be through, in virtual seconds."""

    __slots__ = ("free_s", "queue")

    def __init__(self) -> None:
        self.free_s = 0.0
        self.queue: list[Queued] = []

    def busy_s(self, now_s: float) -> float:
        """Return the seconds from now until everything queued is through."""
        return self.free_s - now_s if self.free_s > now_s else 0.0

    def add(self, transfer: Transfer, start_s: float, duration_s: float) -> float:
        """Queue `transfer`, not before `start_s`; return when it lands."""
        queue = self.queue
        if queue and queue[0].end_s <= start_s:
            self.queue = queue = [entry for entry in queue if entry.end_s > start_s]
        entry = Queued(transfer, max(start_s, self.free_s), duration_s)
        queue.append(entry)
        self.free_s = entry.end_s
        return entry.end_s

    def abort(self, now_s: float, unwanted: Callable[[Transfer], bool]) -> tuple[list[Transfer], list[Queued]]:
        """Drop the unwanted prefetches that have not started; return them and the entries that move forward."""
        waiting = [entry for entry in self.queue if entry.start_s > now_s]
        dropped = [e for e in waiting if e.transfer.kind == "prefetch" and unwanted(e.transfer)]
        if not dropped:
            return [], []
        kept = [entry for entry in waiting if entry not in dropped]
        started = [entry for entry in self.queue if now_s >= entry.start_s]
        free_s = max([now_s, *(entry.end_s for entry in started)])
        for entry in kept:
            entry.start_s = free_s
            entry.end_s = free_s = free_s + entry.duration_s
        self.queue = started + kept
        self.free_s = free_s
        return [entry.transfer for entry in dropped], kept
