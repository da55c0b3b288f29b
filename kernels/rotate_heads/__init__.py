"""Rotary positions of queries and keys."""

from .kernel import rotate_heads
from .naive import naive_rotate_heads

__all__ = ["naive_rotate_heads", "rotate_heads"]
