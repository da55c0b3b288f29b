"""Reference of the norm by root mean square."""

from __future__ import annotations

import torch

__all__ = ["naive_rms_norm"]


def naive_rms_norm(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, *, offset: float = 0.0, rounds_first: bool = True
) -> torch.Tensor:
    """Return `x [..., W]` over the root of its mean square, times `offset + weight [W]`, in the dtype of `x`.

    `rounds_first`: to that dtype before the product with the weight as well, which then has the same.
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    if rounds_first:
        return (weight + offset if offset else weight) * normed.to(x.dtype)
    return (normed * (offset + weight.float())).to(x.dtype)
