"""Reference of a linear layer of many rows."""

from __future__ import annotations

import torch

__all__ = ["naive_linear_many"]


def naive_linear_many(x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return float32 `[T, rows]` for `x [T, heads, columns]` and float32 `matrix [rows, columns]`, `bias [rows]`.

    The matrix's rows are divided evenly among heads.
    """
    by_head = matrix.unflatten(0, (x.shape[1], -1))  # [heads, rows / heads, columns]
    out = torch.einsum("thc,hrc->thr", x.float(), by_head).flatten(1)
    return out if bias is None else out + bias
