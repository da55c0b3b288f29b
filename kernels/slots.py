"""Where a matrix lies in a slot, as kernels take it: a type, a shape and up to four byte offsets."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MatrixInSlot"]


@dataclass(frozen=True, slots=True)
class MatrixInSlot:
    """One of gate `[inter, H]`, up `[inter, H]`, down `[H, inter]`.

    `kind` is GGML's type number; `offsets` the planes' first bytes in the slot, in the order of `formats.FORMATS`,
    filled up to four with zeros.
    """

    kind: int
    rows: int
    columns: int
    offsets: tuple[int, int, int, int]
