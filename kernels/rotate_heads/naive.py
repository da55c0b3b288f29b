"""Reference of the rotation of heads."""

from __future__ import annotations

import torch

from hybrimoe_kt.kernels.row_forms import Rotation

__all__ = ["naive_rotate_heads"]


def naive_rotate_heads(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Turn the first 2P dimensions of `x [..., W]` by angles whose `cos` and `sin` are `[..., P]`; the rest stays."""
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    pairs = (
        turned.unflatten(-1, (half, 2)) if rotation.from_pairs else turned.unflatten(-1, (2, half)).transpose(-1, -2)
    )
    first, second = pairs.unbind(-1)
    if rotation.is_wide:
        first, second, cos, sin = first.float(), second.float(), cos.float(), sin.float()
    answers = first * cos - second * sin, second * cos + first * sin
    joined = torch.stack(answers, dim=-1).flatten(-2) if rotation.to_pairs else torch.cat(answers, dim=-1)
    return torch.cat([joined.to(x.dtype), rest], dim=-1)
