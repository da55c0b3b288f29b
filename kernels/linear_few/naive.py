"""Reference of linear layers of a few rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["naive_linear_few"]


def naive_linear_few(
    x: torch.Tensor, matrices: Sequence[torch.Tensor], bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the products with `x [T, heads, columns]` side by side, float32 `[T, total_rows]`.

    `matrices` are float32 `[rows, columns]`, their rows divided evenly among heads; `bias [total_rows]`.
    """
    parts = [
        torch.einsum("thc,hrc->thr", x.float(), matrix.view(x.shape[1], -1, x.shape[2])).flatten(1)
        for matrix in matrices
    ]
    out = torch.cat(parts, dim=1)
    return out if bias is None else out + bias
