"""A router's choice from its logits."""

from .kernel import choose_experts
from .naive import naive_choose_experts

__all__ = ["choose_experts", "naive_choose_experts"]
