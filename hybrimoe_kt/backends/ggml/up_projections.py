"""The up-projections of latent attention, head by head, as the file has them: from queries to the latent space, and
from latents to values."""

from __future__ import annotations

from typing import Protocol

import torch

from hybrimoe_kt.device.packed import PackedMatrix

from .products import dequantize_into, multiply_heads

__all__ = ["FusedUpProjections", "SplitUpProjections", "UpProjections"]


class UpProjections(Protocol):
    """Of all heads of one layer."""

    def to_latent(self, query: torch.Tensor) -> torch.Tensor:
        """`[batch, heads, tokens, nope]` -> `[batch, heads, tokens, rank]`."""

    def to_values(self, latent: torch.Tensor) -> torch.Tensor:
        """`[batch, heads, tokens, rank]` -> `[batch, heads, tokens, value]`."""


class SplitUpProjections:
    """Two tensors: keys `[heads, rank, nope]`, transposed already, and values `[heads, value, rank]`."""

    def __init__(self, keys: PackedMatrix, values: PackedMatrix) -> None:
        self._keys, self._values = keys, values

    def to_latent(self, query: torch.Tensor) -> torch.Tensor:
        return _times(query, self._keys)

    def to_values(self, latent: torch.Tensor) -> torch.Tensor:
        return _times(latent, self._values)


class FusedUpProjections:
    """One tensor, `[heads, nope + value, rank]`: blocks run along the rank, so that keys are wanted as floats."""

    def __init__(self, both: PackedMatrix, heads: int, nope: int, value: int) -> None:
        self._both, self._heads, self._nope = both, heads, nope
        self._row_bytes = both.data.numel() // both.rows
        rows = nope + value
        self._values = PackedMatrix(both.name, both.data, both.ggml_type, value, both.columns, heads)
        self._stride, self._offset = rows * self._row_bytes, nope * self._row_bytes
        self._keys: torch.Tensor | None = None

    def to_latent(self, query: torch.Tensor) -> torch.Tensor:
        if self._keys is None:
            self._keys = self._dequantised_keys()
        return query @ self._keys.to(query.dtype)

    def to_values(self, latent: torch.Tensor) -> torch.Tensor:
        return _times(latent, self._values, self._stride, self._offset)

    def _dequantised_keys(self) -> torch.Tensor:
        """float32 `[heads, nope, rank]`."""
        keys = torch.empty(self._heads, self._nope, self._both.columns)
        for head, into in enumerate(keys):
            address = self._both.data.data_ptr() + head * self._stride
            dequantize_into(address, self._both.ggml_type, self._nope, self._both.columns, into)
        return keys


def _times(given: torch.Tensor, matrices: PackedMatrix, stride: int = 0, offset: int = 0) -> torch.Tensor:
    """`[batch, heads, tokens, columns]` times every head's matrix, transposed."""
    out = torch.empty(*given.shape[:3], matrices.rows)
    address = matrices.data.data_ptr() + offset
    for one, into in zip(given.float().contiguous(), out, strict=True):
        multiply_heads(address, matrices.ggml_type, matrices.rows, matrices.columns, one, into, stride)
    return out.to(given.dtype)
