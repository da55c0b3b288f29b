"""Host memory that the driver has page-locked in place, counted over the whole process.

A driver locks a page once and for every device; asking again is an error. And it must be told before the memory goes
away: else it keeps the old pages, and copies what stands in *them* for whatever comes to lie at that address next. So
there is one table a process, each range in it is held by whoever asked for it, and a range is given back when the last
holder lets go.

Locking works on whole pages. Around a tensor in a file's mapping only the file is met; around one on the heap there
are strangers' bytes, which would become read-only to devices, and a copy that begins in a locked page and ends in
another is refused. So memory is taken only if its pages are its own, or a file's.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import mmap
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Protocol

import torch

__all__ = ["LOCKS", "PAGE", "Driver", "Lock", "PageLocks", "fresh_pages"]

PAGE = mmap.PAGESIZE


class Driver(Protocol):
    """What of a device's driver is needed; cudart has it."""

    def lock(self, address: int, num_bytes: int, *, read_only: bool) -> bool:
        """Page-lock whole pages for all devices; False where it refuses, nothing pending then."""

    def unlock(self, address: int) -> None:
        """Undo `lock` of the range that begins at `address`."""

    def settle(self) -> None:
        """Return when the device has ended the copies it was given."""


class _Locked:
    """Pages locked by one call of the driver."""

    __slots__ = ("driver", "holders", "pages")

    def __init__(self, pages: range, driver: Driver) -> None:
        self.pages, self.driver, self.holders = pages, driver, 0


class Lock:
    """One holder's claim on some memory, which it keeps alive; `release` gives it back, as does forgetting it."""

    def __init__(self, table: PageLocks, driver: Driver, locked: list[_Locked], memory: torch.Tensor) -> None:
        self._finalizer = weakref.finalize(self, table._release, driver, locked, memory)
        self._finalizer.atexit = False  # the driver may be gone by then, and so will be the process

    def release(self) -> None:
        """Let go, when the device has ended its copies; once is enough."""
        self._finalizer()


class PageLocks:
    """The table. Ranges never overlap; all calls may come from any thread."""

    def __init__(self, is_file: Callable[[range], bool] | None = None) -> None:
        """`is_file` tells whether pages belong to a file's mapping; by default the system is asked."""
        self._is_file = is_file or _is_file
        self._locked: list[_Locked] = []
        """In order of address."""
        self._guard = threading.RLock()  # a collection in the middle of a call may release locks

    def hold(self, driver: Driver, memory: torch.Tensor, *, read_only: bool = True) -> Lock | None:
        """Page-lock `memory`, or share what is locked of it already; None where that cannot be."""
        first, end = memory.data_ptr(), memory.data_ptr() + memory.numel() * memory.element_size()
        pages = range(first // PAGE, -(-end // PAGE))
        is_exact = first % PAGE == 0 and end % PAGE == 0
        if not len(pages) or not (is_exact or self._is_file(pages)):
            return None
        with self._guard:
            known = list(self._around(pages))
            missing = list(_without(pages, [entry.pages for entry in known]))
            made: list[_Locked] = []
            for part in missing:
                if not driver.lock(part.start * PAGE, len(part) * PAGE, read_only=read_only):
                    for entry in made:
                        entry.driver.unlock(entry.pages.start * PAGE)
                    return None
                made.append(_Locked(part, driver))
            for entry in made:
                bisect.insort(self._locked, entry, key=lambda entry: entry.pages.start)
            held = known + made
            for entry in held:
                entry.holders += 1
        return Lock(self, driver, held, memory)

    @property
    def num_bytes(self) -> int:
        """Bytes locked now."""
        with self._guard:
            return sum(len(entry.pages) for entry in self._locked) * PAGE

    def _around(self, pages: range) -> Iterator[_Locked]:
        begin = bisect.bisect_right(self._locked, pages.start, key=lambda entry: entry.pages.start)
        for entry in self._locked[max(0, begin - 1) :]:
            if entry.pages.start >= pages.stop:
                return
            if entry.pages.stop > pages.start:
                yield entry

    def _release(self, driver: Driver, held: list[_Locked], memory: torch.Tensor) -> None:
        """Called with the memory, so that it outlives its locks."""
        driver.settle()
        with self._guard:
            for entry in held:
                entry.holders -= 1
                if entry.holders == 0:
                    self._locked.remove(entry)
                    entry.driver.unlock(entry.pages.start * PAGE)


class _Pages(mmap.mmap):
    """Anonymous memory that lets go of its lock before it goes."""

    lock: Lock | None = None

    def __del__(self) -> None:
        if self.lock is not None:
            with contextlib.suppress(Exception):  # the interpreter is going down
                self.lock.release()


def fresh_pages(num_bytes: int, hold: Callable[[torch.Tensor], Lock | None] | None = None) -> torch.Tensor | None:
    """Return memory in pages of its own, uint8 `[num_bytes]`; locked by `hold` for as long as it lives.

    None where `hold` does not.
    """
    anonymous = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    pages = _Pages(-1, max(1, -(-num_bytes // PAGE)) * PAGE, **anonymous)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # fewer, larger pages: quicker to lock, quicker for a device to look up
            pages.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(pages, dtype=torch.uint8)
    if hold is not None:
        address = whole.data_ptr()
        pages.lock = hold(_alias(address, whole.numel()))
        if pages.lock is None:
            return None
    return whole[:num_bytes]


def _alias(address: int, num_bytes: int) -> torch.Tensor:
    """The same bytes without keeping them alive: who owns them also owns the lock."""
    return torch.frombuffer((ctypes.c_uint8 * num_bytes).from_address(address), dtype=torch.uint8)


def _without(pages: range, taken: list[range]) -> Iterator[range]:
    """The parts of `pages` outside every range in `taken`, which are in order and do not overlap."""
    begin = pages.start
    for other in taken:
        if begin < other.start:
            yield range(begin, min(other.start, pages.stop))
        begin = max(begin, other.stop)
    if begin < pages.stop:
        yield range(begin, pages.stop)


def _is_file(pages: range) -> bool:
    """Whether all of `pages` lie in mappings of one file, as Linux tells."""
    begin, inode = pages.start, ""
    try:
        with open("/proc/self/maps", encoding="ascii", errors="replace") as lines:
            for line in lines:
                span, _, _, device, number, *_ = line.split(maxsplit=5)
                low, high = (int(end, 16) // PAGE for end in span.split("-"))
                if low <= begin < high:
                    if number == "0" or (inode and inode != f"{device} {number}"):
                        return False
                    inode, begin = f"{device} {number}", high
                    if begin >= pages.stop:
                        return True
    except OSError:
        return False
    return False


LOCKS = PageLocks()
"""This process's."""
