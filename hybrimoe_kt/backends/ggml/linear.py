"""A linear layer's product with its packed weight: ggml's own for few tokens, for many torch's of dequantised parts."""

from __future__ import annotations

import functools

import torch

from hybrimoe_kt.device.packed import PackedMatrix, PackedWeight
from hybrimoe_kt.quants import TYPES

from .products import dequantize_into, multiply

__all__ = ["PackedProduct"]

_PIECE_VALUES = 2**21
"""Dequantised at a time for a product with many tokens: 8 MiB, which a core's share of the last cache holds."""
_MANY_TOKENS = 64


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 matrices by instructions of its own.

    Where it does, torch's product of dequantised pieces beats ggml's at 64 tokens and more; float32 on the same cores
    does not always, and rounds no better than what is asked for here: bfloat16 by 0.2 % a value, ggml by 0.4 %.
    """
    known = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(asked is not None and asked() for asked in known)


class PackedProduct:
    """Multiplies by one weight; activations are rounded, by ggml to 8 bits where weights are blocks."""

    def __init__(self, weight: PackedWeight) -> None:
        self._row_order, self._column_order = weight.row_order, weight.column_order
        self._parts = [_Part(part) for part in weight.parts]

    def __call__(self, given: torch.Tensor) -> torch.Tensor:
        """`given [tokens, columns]` times the transposed weight, `[tokens, rows]`; float32, on the CPU."""
        if self._column_order is not None:
            given = given[:, self._column_order]
        given = given.contiguous()
        outs = [part(given) for part in self._parts]
        out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)
        return out if self._row_order is None else out[:, self._row_order]

    def __str__(self) -> str:
        return " + ".join(f"{part.matrix.name}" for part in self._parts)


class _Part:
    def __init__(self, matrix: PackedMatrix) -> None:
        self.matrix = matrix  # keeps the mapping alive
        self._address, self._rows, self._columns = matrix.data.data_ptr(), matrix.rows, matrix.columns
        self._type = matrix.ggml_type
        self._is_rounded_anyhow = TYPES[matrix.ggml_type].dtype not in ("float32", "float16")

    def __call__(self, given: torch.Tensor) -> torch.Tensor:
        out = torch.empty(given.shape[0], self._rows)
        if given.shape[0] >= _MANY_TOKENS and self._is_rounded_anyhow and multiplies_bfloat16():
            self._by_pieces(given, out)
        else:
            multiply(self._address, self._type, self._rows, self._columns, given, out)
        return out

    def _by_pieces(self, given: torch.Tensor, out: torch.Tensor) -> None:
        num_rows = min(self._rows, max(1, _PIECE_VALUES // self._columns))
        row_bytes = self.matrix.data.numel() // self._rows
        values, rounded = torch.empty(num_rows, self._columns), given.bfloat16()
        short = torch.empty(num_rows, self._columns, dtype=torch.bfloat16)
        for first in range(0, self._rows, num_rows):
            size = min(num_rows, self._rows - first)
            dequantize_into(self._address + first * row_bytes, self._type, size, self._columns, values)
            short[:size].copy_(values[:size])
            out[:, first : first + size] = rounded @ short[:size].t()
