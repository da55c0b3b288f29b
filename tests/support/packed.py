"""Random packed matrices beside the values they stand for, and a loader that hands them out."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from gguf.quants import dequantize

from hybrimoe_kt.device.packed import PackedMatrix, PackedWeight
from hybrimoe_kt.quants import TYPES
from tests.support.random_blocks import Type, random_blocks

__all__ = ["PackedLoader", "odd_width", "packed_matrix"]


def odd_width(*kinds: Type) -> int:
    """A multiple of the types' blocks that is as odd as they allow."""
    return {1: 50, 32: 160, 256: 256}[max(TYPES[int(kind)].block_values for kind in kinds)]


def packed_matrix(
    kind: Type, rows: int, columns: int, *, heads: int = 1, seed: int = 0, name: str = "matrix"
) -> tuple[PackedMatrix, torch.Tensor]:
    """The matrix, and its values as gguf-py has them: float32 `[rows, columns]`, of several heads with those first."""
    raw = random_blocks(np.random.default_rng(seed), kind, heads * rows, columns)
    values = torch.from_numpy(np.array(dequantize(raw, kind), dtype=np.float32))
    matrix = PackedMatrix(name, torch.from_numpy(raw).flatten(), int(kind), rows, columns, heads)
    return matrix, values.view(heads, rows, columns) if heads > 1 else values


class PackedLoader:
    """What operators ask for their weights; floats wherever it has none."""

    def __init__(
        self, weights: Mapping[str, PackedWeight] | None = None, tensors: Mapping[str, PackedMatrix] | None = None
    ) -> None:
        """`weights` by parameter, `tensors` by their names in the file."""
        self._weights, self._tensors = weights or {}, tensors or {}

    def packed_weight(
        self, parameter: str, shape: tuple[int, ...], refuses: Callable[[PackedWeight], str | None] | None = None
    ) -> PackedWeight | None:
        found = self._weights.get(parameter)
        assert found is None or (found.rows, found.columns) == shape
        return None if found is not None and refuses is not None and refuses(found) else found

    def packed_tensor(self, name: str) -> PackedMatrix | None:
        return self._tensors.get(name)
