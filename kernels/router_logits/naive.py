"""Reference of a router's product."""

from __future__ import annotations

import torch

__all__ = ["naive_router_logits"]


def naive_router_logits(x: torch.Tensor, weight: torch.Tensor, factors: torch.Tensor | None = None) -> torch.Tensor:
    """Return float32 `[T, E]`: `x [T, W]` and `weight [E, W]` multiplied as float32, whatever they are.

    With `factors [N, W]` the experts are N routers', each given `x` times its own, rounded to the dtype of `weight`.
    """
    if factors is not None:
        given = (x.float()[:, None] * factors.float()).to(weight.dtype).float()  # [T, N, W]
        return torch.einsum("tnw,new->tne", given, weight.float().unflatten(0, (len(factors), -1))).flatten(1)
    return torch.nn.functional.linear(x.float(), weight.float())
