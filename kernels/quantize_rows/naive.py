"""Reference of the activation quantiser."""

from __future__ import annotations

import torch

__all__ = ["naive_quantize_rows"]


def naive_quantize_rows(
    x: torch.Tensor, up: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantise `x [T, W]` (W a multiple of 32) to int8 `[T, W]`, scales and sums of what they stand for `[T, W / 32]`.

    A block's scale is its largest magnitude over 127; a block of zeros has scale 0. With `up`, of silu(x) * up.
    """
    if up is not None:
        x = torch.nn.functional.silu(x) * up
    blocks = x.float().unflatten(1, (-1, 32))  # [T, W / 32, 32]
    scale = blocks.abs().amax(dim=2, keepdim=True) / 127
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    quants = torch.floor(blocks * inverse + 0.5)
    return quants.to(torch.int8).flatten(1), scale[:, :, 0], (scale * quants).sum(dim=2)
