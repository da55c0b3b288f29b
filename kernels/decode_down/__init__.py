"""Down projection and weighted sum of a few tokens' experts."""

from .kernel import decode_down
from .naive import naive_decode_down

__all__ = ["decode_down", "naive_decode_down"]
