"""Dense matrices on an accelerator as the file has them: those that share their input, in one piece of memory.

Rows of one type lie one above the other and are one matrix to a kernel, whichever layers they belong to; in the order
that the model wants, so that nothing is permuted later but where one layer's rows are of several types.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from hybrimoe_kt.quants import row_bytes

from .layout import MatrixLayout
from .packed import PackedMatrix, PackedWeight

__all__ = ["DenseMatrices"]

_PIECE_BYTES = 2**25
"""Copied at a time: what the device holds beside the result while it takes blocks apart."""


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows that follow each other in the memory: all of `parts`, or those of them that `chosen` names, int64."""

    parts: tuple[PackedMatrix, ...]
    chosen: torch.Tensor | None
    features: torch.Tensor | None
    """Which of the layer's features they are; None: all, in order."""

    @property
    def count(self) -> int:
        return sum(part.rows for part in self.parts) if self.chosen is None else len(self.chosen)

    def pieces(self) -> Iterator[torch.Tensor]:
        """Their bytes, uint8 `[num_rows, row_bytes]` a piece, on the CPU."""
        blocks = [part.data.view(part.rows, -1) for part in self.parts]
        if self.chosen is None:
            for block in blocks:
                yield from block.split(max(1, _PIECE_BYTES // block.shape[1]))
            return
        whole = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
        for numbers in self.chosen.split(max(1, _PIECE_BYTES // whole.shape[1])):
            yield whole[numbers]


class DenseMatrices:
    """Weights of linear layers that are given the same input; nothing is allocated or read before `load`.

    The product of all of them is `[num_tokens, rows]`, and layer `i`'s features are `features(i)` of it.
    """

    memory: torch.Tensor
    """uint8 `[num_bytes]`, once loaded."""

    def __init__(self, weights: Sequence[PackedWeight]) -> None:
        self.weights = tuple(weights)
        self._rows: dict[int, list[_Rows]] = {}
        owners: dict[int, list[int]] = {}
        for number, weight in enumerate(weights):
            for ggml_type, rows in _by_type(weight):
                self._rows.setdefault(ggml_type, []).append(rows)
                owners.setdefault(ggml_type, []).append(number)
        layouts: list[MatrixLayout] = []
        for ggml_type, sources in self._rows.items():
            begin = layouts[-1].end_bytes if layouts else 0
            count = sum(rows.count for rows in sources)
            layouts.append(MatrixLayout.at(begin, ggml_type, count, weights[0].columns))
        self.layouts = tuple(layouts)
        """One a type."""
        self.num_bytes = layouts[-1].end_bytes
        self._features = self._places(owners)

    def _places(self, owners: dict[int, list[int]]) -> list[tuple[int, int] | torch.Tensor]:
        """For each weight where its features are in the product: begin and number, or their places one by one."""
        found: list[list[tuple[int, _Rows]]] = [[] for _ in self.weights]
        begin = 0
        for ggml_type, sources in self._rows.items():
            for owner, rows in zip(owners[ggml_type], sources, strict=True):
                found[owner].append((begin, rows))
                begin += rows.count
        places: list[tuple[int, int] | torch.Tensor] = []
        for weight, runs in zip(self.weights, found, strict=True):
            if len(runs) == 1:
                places.append((runs[0][0], weight.features))
                continue
            index = torch.empty(weight.features, dtype=torch.int64, device="cpu")
            for begin, rows in runs:
                assert rows.features is not None, "of several types, so that each says which features it is"
                index[rows.features] = torch.arange(begin, begin + rows.count, device="cpu")
            places.append(index)
        return places

    @property
    def rows(self) -> int:
        return sum(layout.rows for layout in self.layouts)

    @property
    def columns(self) -> int:
        return self.layouts[0].columns

    @property
    def file_bytes(self) -> int:
        """What is read of the file."""
        return sum(layout.rows * row_bytes(layout.type.number, layout.columns) for layout in self.layouts)

    def load(self, device: torch.device, told: Callable[[int], object] = lambda num_bytes: None) -> None:
        """Copy everything to `device`; `told` hears of bytes of the file as they are done."""
        self.memory = torch.empty(self.num_bytes, dtype=torch.uint8, device=device)
        for layout, sources in zip(self.layouts, self._rows.values(), strict=True):
            kind, first = layout.type, 0
            for rows in sources:
                for piece in rows.pieces():
                    blocks = piece.to(device).view(-1, kind.block_bytes)
                    for segment in layout.segments:
                        segment.split(blocks, self.memory, first)
                    first += len(blocks)
                    told(piece.numel())
        self._features = [place if isinstance(place, tuple) else place.to(device) for place in self._features]

    def features(self, number: int, product: torch.Tensor) -> torch.Tensor:
        """One layer's part of the product `[num_tokens, rows]`: a view, but for rows of several types."""
        place = self._features[number]
        return product[:, place[0] : place[0] + place[1]] if isinstance(place, tuple) else product[:, place]

    def together(self, values: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
        """One row of the product made of one each of the layers', None for zeros: float32 `[rows]` on the device.

        None where there is nothing but zeros.
        """
        if all(value is None for value in values):
            return None
        whole = torch.zeros(1, self.rows, device=self.memory.device)
        for number, value in enumerate(values):
            place = self._features[number]
            if value is not None:
                at = slice(place[0], place[0] + place[1]) if isinstance(place, tuple) else place
                whole[:, at] = value.to(whole)
        return whole[0]

    def file_rows(self, layout: MatrixLayout, first: int, count: int) -> torch.Tensor:
        """Some rows of one type's matrix as the file has them: uint8 `[count * row_bytes]`, on the device."""
        blocks = layout.columns // layout.type.block_values
        in_order = sorted(layout.segments, key=lambda segment: segment.plane.offset_bytes)
        planes = [segment.part_of(self.memory, first * blocks, count * blocks) for segment in in_order]
        return (planes[0] if len(planes) == 1 else torch.cat(planes, dim=1)).flatten()


def _by_type(weight: PackedWeight) -> Iterator[tuple[int, _Rows]]:
    """A weight's rows by their types, in the order of the model's features."""
    types = list(dict.fromkeys(part.ggml_type for part in weight.parts))
    order = weight.row_order
    if order is None and len(types) == 1:
        yield types[0], _Rows(weight.parts, None, None)
        return
    order = torch.arange(weight.rows, device="cpu") if order is None else order
    numbers = torch.empty(weight.rows, dtype=torch.int64, device="cpu")  # row -> its number among its type's
    kinds = torch.empty(weight.rows, dtype=torch.int64, device="cpu")
    first, counts = 0, dict.fromkeys(types, 0)
    for part in weight.parts:
        rows = slice(first, first + part.rows)
        numbers[rows] = torch.arange(part.rows, device="cpu") + counts[part.ggml_type]
        kinds[rows] = part.ggml_type
        counts[part.ggml_type] += part.rows
        first += part.rows
    for ggml_type in types:
        features = torch.where(kinds[order] == ggml_type)[0]
        parts = tuple(part for part in weight.parts if part.ggml_type == ggml_type)
        yield ggml_type, _Rows(parts, numbers[order[features]], features)
