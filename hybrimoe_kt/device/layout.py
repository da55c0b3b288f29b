"""How matrices lie in accelerator memory, in the form that GPU kernels read, and how an expert's lie in a slot.

A matrix is stored as its type's *planes* (see `quants`): first every block's quants, then every block's scales, and
so on, each plane contiguous over the whole matrix in block order. The bytes are the file's, rearranged; a slot is as
large as the expert but for alignment.

    slot:  | gate | up | down | biases |    each from a 128-byte boundary
    Q8_0 matrix:  | qs: rows * columns bytes | d: rows * columns / 32 halves |     each from a 128-byte boundary

The mapped file keeps GGUF's order, which the CPU kernels read. Taking blocks apart happens on the device, between
the copy and the slot, or once for all when the host keeps a page-locked copy in this layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hybrimoe_kt.quants import TYPES, Plane, QuantType

from .experts import LayerExperts

__all__ = ["ALIGNMENT_BYTES", "MatrixLayout", "Segment", "SlotLayout"]

ALIGNMENT_BYTES = 128
"""Where segments begin: one cache line of every GPU here, and a multiple of the widest load (16 bytes)."""


@dataclass(frozen=True, slots=True)
class Segment:
    """One contiguous run of memory: one plane of one matrix (in a slot, of its `matrix`th)."""

    matrix: int
    plane: Plane
    block_bytes: int
    num_blocks: int
    start_bytes: int
    """Where it begins in the memory."""

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.plane.width_bytes

    def split(self, blocks: torch.Tensor, memory: torch.Tensor, first_block: int = 0) -> None:
        """Copy this plane out of whole blocks, uint8 `[num_blocks, block_bytes]`, to where it belongs in `memory`."""
        begin = self.plane.offset_bytes
        self.part_of(memory, first_block, len(blocks)).copy_(blocks[:, begin : begin + self.plane.width_bytes])

    def part_of(self, memory: torch.Tensor, first_block: int, num_blocks: int) -> torch.Tensor:
        """This plane of some blocks in `memory`, uint8 `[num_blocks, width_bytes]`, contiguous."""
        width = self.plane.width_bytes
        start = self.start_bytes + first_block * width
        return memory[start : start + num_blocks * width].view(num_blocks, width)


@dataclass(frozen=True, slots=True)
class MatrixLayout:
    """One matrix `[rows, columns]` in memory that it may share with others."""

    name: str
    type: QuantType
    rows: int
    columns: int
    segments: tuple[Segment, ...]
    offsets: tuple[int, int, int, int]
    """The planes' first bytes, as kernels take them: filled up to four with zeros."""

    @classmethod
    def at(
        cls, start_bytes: int, ggml_type: int, rows: int, columns: int, name: str = "", number: int = 0
    ) -> MatrixLayout:
        """Lay a matrix out from `start_bytes` on, a multiple of the alignment; it is the memory's `number`th."""
        kind = TYPES[ggml_type]
        segments, begin = [], start_bytes
        for plane in kind.planes:
            num_blocks = rows * columns // kind.block_values
            segments.append(Segment(number, plane, kind.block_bytes, num_blocks, begin))
            begin = _aligned(begin + segments[-1].num_bytes)
        first, second, third, fourth = ([segment.start_bytes for segment in segments] + [0] * 3)[:4]
        return cls(name, kind, rows, columns, tuple(segments), (first, second, third, fourth))

    @property
    def end_bytes(self) -> int:
        """Where the next matrix may begin."""
        return _aligned(self.segments[-1].start_bytes + self.segments[-1].num_bytes)

    def write(self, data: torch.Tensor, memory: torch.Tensor) -> None:
        """Lay the matrix's bytes (GGUF order) out in `memory`, uint8 `[num_bytes]` both."""
        for segment in self.segments:
            segment.split(data.view(segment.num_blocks, segment.block_bytes), memory)

    def read(self, memory: torch.Tensor) -> torch.Tensor:
        """Return the matrix in GGUF order, uint8 `[num_bytes]`: a view where the order is the file's."""
        in_file_order = sorted(self.segments, key=lambda segment: segment.plane.offset_bytes)
        planes = [segment.part_of(memory, 0, segment.num_blocks) for segment in in_file_order]
        return planes[0].flatten() if len(planes) == 1 else torch.cat(planes, dim=1).flatten()


class SlotLayout:
    """Where everything of one layer's experts stands in a slot; the same for all experts of the layer."""

    def __init__(self, experts: LayerExperts) -> None:
        matrices: list[MatrixLayout] = []
        for number, (name, matrix) in enumerate(experts.tensors.items()):
            begin = matrices[-1].end_bytes if matrices else 0
            matrices.append(MatrixLayout.at(begin, matrix.ggml_type, matrix.rows, matrix.columns, name, number))
        self.matrices = tuple(matrices)
        """All of an expert's tensors, in order: gate, up, down, and a row for each bias."""
        self.named = {matrix.name: matrix for matrix in matrices}
        self.segments = tuple(segment for matrix in matrices for segment in matrix.segments)
        self.slot_bytes = matrices[-1].end_bytes

    @property
    def is_file_order(self) -> bool:
        """Whether every matrix stands in the slot as it does in the file."""
        return all(segment.plane.width_bytes == segment.block_bytes for segment in self.segments)

    def write(self, parts: Sequence[torch.Tensor], slot: torch.Tensor) -> None:
        """Lay an expert's parts (GGUF order) out in `slot`, uint8 `[slot_bytes]`."""
        for matrix, part in zip(self.matrices, parts, strict=True):
            matrix.write(part, slot)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
