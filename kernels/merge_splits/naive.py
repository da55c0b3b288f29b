"""Reference of the sum over splits."""

from __future__ import annotations

import torch

__all__ = ["naive_merge_splits"]


def naive_merge_splits(answers: torch.Tensor, weights: torch.Tensor, sinks: torch.Tensor | None = None) -> torch.Tensor:
    """Return float32 `[heads, width]` for `answers [heads, splits, width]`, all of which have tokens.

    `weights [heads, splits]` are logarithms to base 2, `sinks [heads]` natural ones.
    """
    shares = weights.float().exp2()
    total = shares.sum(1) + (0 if sinks is None else sinks.float().exp())
    return torch.einsum("hs,hsw->hw", shares, answers) / total[:, None]
