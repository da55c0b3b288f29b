"""Page-locked memory that copies pass through when the experts themselves cannot be page-locked."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .accelerator import Accelerator, Event, Stream
from .layout import Segment, SlotLayout
from .waiting import Patience

__all__ = ["Chunk", "Ring", "chunks_of"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a slot, `[start_bytes, end_bytes)`, and the runs of blocks that fill it."""

    start_bytes: int
    end_bytes: int
    runs: tuple[tuple[Segment, int, int], ...]
    """Segment, first block, number of blocks."""

    def gather(self, parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor], target: torch.Tensor) -> None:
        """Fill `target`, uint8 `[end - start]`, from an expert's matrices in GGUF order."""
        for segment, first, count in self.runs:
            width = segment.plane.width_bytes
            at = segment.start_bytes + first * width - self.start_bytes
            segment.gather(parts[segment.matrix], target[at : at + count * width], first, count)


def chunks_of(layout: SlotLayout, chunk_bytes: int) -> tuple[Chunk, ...]:
    """Cut a slot into pieces of at most `chunk_bytes` (but never less than a block) that cover it once."""
    runs: list[tuple[Segment, int, int]] = []
    for segment in layout.segments:
        step = max(1, chunk_bytes // segment.plane.width_bytes)
        runs += [(segment, at, min(step, segment.num_blocks - at)) for at in range(0, segment.num_blocks, step)]
    groups: list[list[tuple[Segment, int, int]]] = []
    start = 0
    for run in runs:
        end = _end_bytes(run)
        if not groups or end - start > chunk_bytes:
            groups.append([])
            start = run[0].start_bytes + run[1] * run[0].plane.width_bytes
        groups[-1].append(run)
    starts = [group[0][0].start_bytes + group[0][1] * group[0][0].plane.width_bytes for group in groups]
    ends = [_end_bytes(group[-1]) for group in groups]
    return tuple(Chunk(a, b, tuple(group)) for a, b, group in zip(starts, ends, groups, strict=True))


def _end_bytes(run: tuple[Segment, int, int]) -> int:
    segment, first, count = run
    return segment.start_bytes + (first + count) * segment.plane.width_bytes


class Ring:
    """`num_chunks` places for copies under way, used in turn; with buffers of `chunk_bytes`, or none."""

    def __init__(self, accelerator: Accelerator, num_chunks: int, chunk_bytes: int, site: str) -> None:
        self._accelerator, self._site, self._next = accelerator, site, 0
        self._events: list[Event] = [accelerator.event() for _ in range(num_chunks)]
        memory = accelerator.page_locked(num_chunks * chunk_bytes) if chunk_bytes else torch.empty(0)
        self._buffers = memory.view(num_chunks, chunk_bytes) if chunk_bytes else memory

    def has_room(self) -> bool:
        """Whether the next place is free; never blocks."""
        return self._events[self._next].is_done()

    def take(self, patience: Patience, num_bytes: int) -> torch.Tensor:
        """Wait for the next place and return its buffer, uint8 `[num_bytes]`."""
        patience.wait(self._events[self._next].is_done, "a copy to the accelerator")
        return self._buffers[self._next, :num_bytes] if self._buffers.numel() else self._buffers

    def give(self, stream: Stream) -> None:
        """Call the place just taken busy until what `stream` has been given is done."""
        stream.record(self._events[self._next], self._site)
        self._next = (self._next + 1) % len(self._events)

    def forget_failures(self) -> None:
        """Use places again whose last copy failed; those still under way stay taken."""
        for number, event in enumerate(self._events):
            try:
                event.is_done()
            except RuntimeError:
                self._events[number] = self._accelerator.event()
