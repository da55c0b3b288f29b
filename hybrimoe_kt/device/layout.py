"""How one expert lies in a slot: gate, up, down, each in the form that GPU kernels read.

GPU kernels load 16 bytes at a time. Q4_K and Q5_K blocks (144 and 176 bytes) allow that where they stand; Q6_K,
Q8_0, Q5_0 and Q4_0 blocks (210, 34, 22 and 18 bytes) are only 2-byte aligned. A matrix of those is stored as
*planes*: first every block's quants, then every block's scales, and so on, each plane contiguous over the whole
matrix in block order. The bytes are the file's, rearranged; a slot is as large as the expert but for alignment.

    slot:  | gate | up | down |            each from a 128-byte boundary
    Q8_0 matrix:  | qs: rows * columns bytes | d: rows * columns / 32 halves |     each from a 128-byte boundary

The mapped file keeps GGUF's order, which the CPU kernels read. Taking blocks apart happens on the device, between
the copy and the slot, or once for all when the host keeps a page-locked copy in this layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from .host_store import LayerExperts

__all__ = ["ALIGNMENT_BYTES", "PLANES", "Plane", "Segment", "SlotLayout"]

ALIGNMENT_BYTES = 128
"""Where segments begin: one cache line of every GPU here, and a multiple of the widest load (16 bytes)."""


@dataclass(frozen=True, slots=True)
class Plane:
    """One field of a quantisation block: `width_bytes` at `offset_bytes` within each block."""

    name: str
    offset_bytes: int
    width_bytes: int


PLANES: Mapping[int, tuple[Plane, ...]] = {
    GGMLQuantizationType.Q4_0: (Plane("qs", 2, 16), Plane("d", 0, 2)),
    GGMLQuantizationType.Q5_0: (Plane("qs", 6, 16), Plane("qh", 2, 4), Plane("d", 0, 2)),
    GGMLQuantizationType.Q8_0: (Plane("qs", 2, 32), Plane("d", 0, 2)),
    GGMLQuantizationType.Q6_K: (
        Plane("ql", 0, 128),
        Plane("qh", 128, 64),
        Plane("scales", 192, 16),
        Plane("d", 208, 2),
    ),
}
"""The types whose blocks are taken apart, and into which planes, in slot order. All others stay as they are."""


@dataclass(frozen=True, slots=True)
class Segment:
    """One contiguous run of a slot: one plane of one matrix (`matrix` 0 gate, 1 up, 2 down)."""

    matrix: int
    plane: Plane
    block_bytes: int
    num_blocks: int
    start_bytes: int
    """Where it begins in the slot."""

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.plane.width_bytes

    def split(self, blocks: torch.Tensor, slot: torch.Tensor, first_block: int = 0) -> None:
        """Copy this plane out of whole blocks, uint8 `[num_blocks, block_bytes]`, to where it belongs in `slot`."""
        begin = self.plane.offset_bytes
        self.part_of(slot, first_block, len(blocks)).copy_(blocks[:, begin : begin + self.plane.width_bytes])

    def part_of(self, slot: torch.Tensor, first_block: int, num_blocks: int) -> torch.Tensor:
        """This plane of some blocks in `slot`, uint8 `[num_blocks, width_bytes]`, contiguous."""
        width = self.plane.width_bytes
        start = self.start_bytes + first_block * width
        return slot[start : start + num_blocks * width].view(num_blocks, width)


class SlotLayout:
    """Where everything of one layer's experts stands in a slot; the same for all experts of the layer."""

    def __init__(self, experts: LayerExperts) -> None:
        self.segments: tuple[Segment, ...] = tuple(self._lay_out(experts))
        last = self.segments[-1]
        self.slot_bytes = _aligned(last.start_bytes + last.num_bytes)

    @staticmethod
    def _lay_out(experts: LayerExperts) -> list[Segment]:
        segments, at = [], 0
        for number, matrix in enumerate(experts.matrices):
            values, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(matrix.ggml_type)]
            num_blocks = matrix.rows * matrix.columns // values
            for plane in PLANES.get(matrix.ggml_type, (Plane("blocks", 0, block_bytes),)):
                segments.append(Segment(number, plane, block_bytes, num_blocks, at))
                at = _aligned(at + segments[-1].num_bytes)
        return segments

    @property
    def is_file_order(self) -> bool:
        """Whether every matrix stands in the slot as it does in the file."""
        return all(segment.plane.width_bytes == segment.block_bytes for segment in self.segments)

    def segments_of(self, matrix: int) -> tuple[Segment, ...]:
        """The planes of gate (0), up (1) or down (2), in slot order."""
        return tuple(segment for segment in self.segments if segment.matrix == matrix)

    def write(self, parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor], slot: torch.Tensor) -> None:
        """Lay an expert's gate, up and down bytes (GGUF order) out in `slot`, uint8 `[slot_bytes]`."""
        for segment in self.segments:
            segment.split(parts[segment.matrix].view(segment.num_blocks, segment.block_bytes), slot)

    def read(self, slot: torch.Tensor, matrix: int) -> torch.Tensor:
        """Return one matrix of a slot in GGUF order, uint8 `[num_bytes]`: a view where the order is the file's."""
        segments = self.segments_of(matrix)
        planes = [segment.part_of(slot, 0, segment.num_blocks) for segment in segments]
        if len(planes) == 1:
            return planes[0].flatten()
        in_file_order = sorted(range(len(planes)), key=lambda number: segments[number].plane.offset_bytes)
        return torch.cat([planes[number] for number in in_file_order], dim=1).flatten()


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
