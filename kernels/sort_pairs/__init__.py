"""(token, expert) pairs grouped by expert, in blocks for a grouped matrix product."""

from .kernel import sort_pairs
from .naive import naive_sort_pairs

__all__ = ["naive_sort_pairs", "sort_pairs"]
