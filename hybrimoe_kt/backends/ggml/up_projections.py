"""The up-projections of latent attention, head by head, as the file has them: from queries to the latent space, and
from latents to values."""

from __future__ import annotations

from typing import Protocol

import torch

from hybrimoe_kt.device.packed import PackedMatrix

from .library import F16
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
        self.keys, self.values = keys, values

    def to_latent(self, query: torch.Tensor) -> torch.Tensor:
        return _times(query, self.keys)

    def to_values(self, latent: torch.Tensor) -> torch.Tensor:
        return _times(latent, self.values)


class FusedUpProjections:
    """One tensor, `[heads, nope + value, rank]`: blocks run along the rank, so that keys are wanted as floats."""

    def __init__(self, both: PackedMatrix, heads: int, nope: int, value: int) -> None:
        self._both, self._heads, self._nope = both, heads, nope
        row_bytes = both.data.numel() // both.rows
        self.values = PackedMatrix(both.name, both.data, both.ggml_type, value, both.columns, heads)
        """Each head's `stride` bytes behind the one before, the first `offset` behind the data's beginning."""
        self.stride, self.offset = (nope + value) * row_bytes, nope * row_bytes
        self._keys: torch.Tensor | None = None

    def to_latent(self, query: torch.Tensor) -> torch.Tensor:
        return query @ self._transposed().transpose(1, 2).to(query.dtype)

    def to_values(self, latent: torch.Tensor) -> torch.Tensor:
        return _times(latent, self.values, self.stride, self.offset)

    def transposed_keys(self) -> PackedMatrix:
        """As `SplitUpProjections` has them, `[heads, rank, nope]` in float16."""
        keys = self._transposed()
        _, rank, nope = keys.shape
        return PackedMatrix(self._both.name, keys.view(torch.uint8).flatten(), F16, rank, nope, self._heads)

    def _transposed(self) -> torch.Tensor:
        """float16 `[heads, rank, nope]`: half of what float32 would take, and finer than any block."""
        if self._keys is None:
            rank = self._both.columns
            self._keys = torch.empty(self._heads, rank, self._nope, dtype=torch.float16)
            floats = torch.empty(self._nope, rank)
            for head, into in enumerate(self._keys):
                address = self._both.data.data_ptr() + head * self.stride
                dequantize_into(address, self._both.ggml_type, self._nope, rank, floats)
                into.copy_(floats.t())
        return self._keys


def _times(given: torch.Tensor, matrices: PackedMatrix, stride: int = 0, offset: int = 0) -> torch.Tensor:
    """`[batch, heads, tokens, columns]` times every head's matrix, transposed."""
    out = torch.empty(*given.shape[:3], matrices.rows)
    address = matrices.data.data_ptr() + offset
    for one, into in zip(given.float().contiguous(), out, strict=True):
        multiply_heads(address, matrices.ggml_type, matrices.rows, matrices.columns, one, into, stride)
    return out.to(given.dtype)
