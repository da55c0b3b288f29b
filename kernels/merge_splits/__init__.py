"""Sum of the answers of attention's splits."""

from .kernel import merge_splits
from .naive import naive_merge_splits

__all__ = ["merge_splits", "naive_merge_splits"]
