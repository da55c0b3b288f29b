"""What a rotation of heads and a ranking of experts are, as data; no Triton needed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Ranking", "Rotation"]


@dataclass(frozen=True, slots=True)
class Rotation:
    """Which dimensions are turned together, and where they stand afterwards."""

    from_pairs: bool = False
    """Whether neighbours 2p and 2p + 1 are turned together; else p and p plus half the rotated dimensions."""
    to_pairs: bool = False
    """Whether they are neighbours afterwards."""
    is_wide: bool = False
    """Whether products stay float32 until they have been added; else each is rounded to the heads' dtype."""


@dataclass(frozen=True, slots=True)
class Ranking:
    """How experts are ranked and weighted by their logits."""

    top_k: int
    is_sigmoid: bool = False
    """Whether a logit's sigmoid is its score; else all their softmax."""
    num_groups: int = 1
    num_best_groups: int = 1
    """Only these groups' experts are looked at; they are neighbours."""
    is_group_of_two: bool = True
    """Whether a group is as good as its two best experts, else as its best."""
    is_normalised: bool = True
    """Whether weights are divided by their sum, or by `least`, should that be more."""
    least: float = 1e-20
    factor: float = 1.0
    """On the weights, last."""
    rounded_to: torch.dtype = torch.float32
    """Weights are rounded to this dtype, and float32 again."""
