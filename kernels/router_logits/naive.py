"""Reference of a router's product."""

from __future__ import annotations

import torch

__all__ = ["naive_router_logits"]


def naive_router_logits(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return float32 `[T, E]`: `x [T, W]` and `weight [E, W]` multiplied as float32, whatever they are."""
    return torch.nn.functional.linear(x.float(), weight.float())
