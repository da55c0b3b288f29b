"""Weighted sum of every token's answers."""

from .kernel import combine_pairs
from .naive import naive_combine_pairs

__all__ = ["combine_pairs", "naive_combine_pairs"]
