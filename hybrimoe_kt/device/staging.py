"""How an expert is cut for the way to its slot, and the page-locked memory it passes through if it must."""

from __future__ import annotations

import torch

from hybrimoe_kt.errors import KernelError

from .accelerator import Accelerator, Event, Stream
from .experts import ExpertParts
from .layout import Segment, SlotLayout
from .waiting import Deadline

__all__ = ["Chunk", "Ring", "Run", "chunks_of", "spans_of"]


class Run:
    """Neighbouring blocks of one matrix, as the file has them, and the planes they become."""

    __slots__ = ("_place", "first_block", "is_file_order", "matrix", "num_blocks", "num_bytes", "segments")

    def __init__(self, segments: tuple[Segment, ...], first_block: int, num_blocks: int) -> None:
        self.segments, self.first_block, self.num_blocks = segments, first_block, num_blocks
        self.matrix, block_bytes = segments[0].matrix, segments[0].block_bytes
        self.num_bytes = num_blocks * block_bytes
        self.is_file_order = len(segments) == 1
        """Whether the slot holds these blocks whole."""
        self._place = slice(first_block * block_bytes, first_block * block_bytes + self.num_bytes)

    def source(self, parts: ExpertParts) -> torch.Tensor:
        """The blocks' bytes in an expert's matrices, uint8 `[num_bytes]`."""
        return parts[self.matrix][self._place]

    def targets(self, slot: torch.Tensor) -> list[torch.Tensor]:
        """Where the planes go in `slot`, each uint8 `[num_blocks, width_bytes]`."""
        if self.is_file_order:
            return [self.segments[0].part_of(slot, self.first_block, self.num_blocks)]
        return [segment.part_of(slot, self.first_block, self.num_blocks) for segment in self.segments]

    def split(self, blocks: torch.Tensor, slot: torch.Tensor) -> None:
        """Take blocks (uint8 `[num_bytes]`, on the slot's device) apart into `slot`."""
        for segment in self.segments:
            segment.split(blocks.view(self.num_blocks, segment.block_bytes), slot, self.first_block)


Chunk = tuple[Run, ...]
"""What is sent together."""


def chunks_of(layout: SlotLayout, chunk_bytes: int) -> tuple[Chunk, ...]:
    """Cut an expert into pieces of at most `chunk_bytes` (but never less than a block) that cover it once."""
    chunks: list[list[Run]] = [[]]
    room = chunk_bytes
    for matrix in layout.matrices:
        segments = matrix.segments
        num_blocks, block_bytes = segments[0].num_blocks, segments[0].block_bytes
        first = 0
        while first < num_blocks:
            count = min(num_blocks - first, max(room // block_bytes, 0 if chunks[-1] else 1))
            if count:
                chunks[-1].append(Run(segments, first, count))
                first, room = first + count, room - count * block_bytes
            if first < num_blocks:
                chunks.append([])
                room = chunk_bytes
    return tuple(tuple(runs) for runs in chunks if runs)


def spans_of(layout: SlotLayout, span_bytes: int) -> tuple[slice, ...]:
    """Cut a slot into pieces of at most `span_bytes` that cover it once: host copies in slot layout are sent so."""
    return tuple(slice(at, min(at + span_bytes, layout.slot_bytes)) for at in range(0, layout.slot_bytes, span_bytes))


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

    def take(self, deadline: Deadline) -> torch.Tensor:
        """Wait for the next place and return its buffer, uint8 `[chunk_bytes]` (empty without buffers)."""
        if not self._events[self._next].is_done():
            deadline.wait(self._events[self._next].is_done, "a copy to the accelerator")
        return self._buffers[self._next] if self._buffers.numel() else self._buffers

    def give(self, stream: Stream) -> None:
        """Call the place just taken busy until what `stream` has been given is done."""
        stream.record(self._events[self._next], self._site)
        self._next = (self._next + 1) % len(self._events)

    def forget_failures(self) -> None:
        """Use places again whose last copy failed; those still under way stay taken."""
        for number, event in enumerate(self._events):
            try:
                event.is_done()
            except (RuntimeError, KernelError):
                self._events[number] = self._accelerator.event()
