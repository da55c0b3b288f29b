"""Dense matrices as the file has them: in blocks, in the mapping, never copied."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["PackedMatrix", "PackedWeight"]


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """One tensor of the file: `data` uint8 `[num_bytes]`, on the CPU; `heads` matrices one after the other."""

    name: str
    data: torch.Tensor
    ggml_type: int
    rows: int
    columns: int
    heads: int = 1


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A linear layer's weight `[rows, columns]`: parts one above the other, and in which order the model wants them.

    Feature `i` of the output is row `row_order[i]` of the parts, some of whose rows may be no feature; feature
    `column_order[i]` of the input meets column `i`. None: in order. int64 on the CPU.
    """

    parts: tuple[PackedMatrix, ...]
    row_order: torch.Tensor | None = None
    column_order: torch.Tensor | None = None

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.parts)

    @property
    def features(self) -> int:
        """Of the output."""
        return self.rows if self.row_order is None else len(self.row_order)

    @property
    def columns(self) -> int:
        return self.parts[0].columns
