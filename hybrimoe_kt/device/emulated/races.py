"""Finds pairs of accesses that nothing orders, by vector clocks.

A participant is whatever runs on its own: the host, each stream, the CPU backend's worker. Each carries a clock
with one count per participant; what it has waited for is merged in. Two accesses to overlapping memory, one of
them a write, race unless the later one's clock has reached the earlier one's count. That holds for every order the
hardware might choose, not only for the one that was tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

__all__ = ["Access", "Race", "RaceDetector"]

Clock = list[int]


class Access(NamedTuple):
    """Who touched something, at which of its own counts, and for what."""

    who: int
    count: int  # type: ignore[assignment]  # the field hides tuple.count on purpose
    site: str


class Race(NamedTuple):
    """Two accesses to the same bytes that no wait orders."""

    kind: str
    first: str
    second: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.second} is not ordered after {self.first}"


@dataclass(eq=False, slots=True)
class _Region:
    start: int
    end: int
    last_write: Access | None = None
    last_reads: dict[int, Access] = field(default_factory=dict)
    overlapping: list[_Region] = field(default_factory=list)


class RaceDetector:
    """Clocks of all participants and the last accesses to every region of memory they declared."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.clocks: list[Clock] = []
        self._found: dict[Race, None] = {}
        self._regions: dict[tuple[int, int], _Region] = {}

    @property
    def races(self) -> list[Race]:
        """Every distinct race so far, in the order found."""
        return list(self._found)

    def participant(self, name: str) -> int:
        """Add somebody who runs on their own; return their number."""
        self.names.append(name)
        for clock in self.clocks:
            clock.append(0)
        self.clocks.append([0] * len(self.names))
        return len(self.names) - 1

    def tick(self, who: int) -> Clock:
        """Begin `who`'s next action; return the clock it happens at."""
        clock = self.clocks[who]
        clock[who] += 1
        return list(clock)

    def merge(self, who: int, seen: Clock) -> None:
        """Order everything `who` does from now on after what `seen` has reached."""
        clock = self.clocks[who]
        self.clocks[who] = [max(pair) for pair in zip(clock, seen + [0] * (len(clock) - len(seen)), strict=True)]

    def access(
        self, who: int, clock: Clock, site: str, reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor]
    ) -> None:
        """Book what `who` reads and writes at `clock`, and report what is not ordered."""
        access = Access(who, clock[who], site)
        for tensor in reads:
            region = self._region(tensor)
            for other in region.overlapping:
                self._check("write then read", other.last_write, access, clock)
            region.last_reads[who] = access
        for tensor in writes:
            region = self._region(tensor)
            for other in region.overlapping:
                self._check("write then write", other.last_write, access, clock)
                for read in other.last_reads.values():
                    self._check("read then write", read, access, clock)
            region.last_write = access
            region.last_reads = {}

    def _check(self, kind: str, earlier: Access | None, later: Access, clock: Clock) -> None:
        if earlier is None or earlier.who == later.who:
            return
        if clock[earlier.who] < earlier.count:
            names = self.names
            self._found[Race(kind, f"{earlier.site} ({names[earlier.who]})", f"{later.site} ({names[later.who]})")] = (
                None
            )

    def _region(self, tensor: torch.Tensor) -> _Region:
        start = tensor.data_ptr()
        key = start, start + tensor.numel() * tensor.element_size()
        region = self._regions.get(key)
        if region is None:
            assert tensor.is_contiguous(), "declared accesses are contiguous"
            region = self._regions[key] = _Region(*key)
            region.overlapping = [o for o in self._regions.values() if o.start < region.end and region.start < o.end]
            for other in region.overlapping:
                if other is not region:
                    other.overlapping.append(region)
        return region
