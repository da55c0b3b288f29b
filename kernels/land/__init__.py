"""The word that copies are through."""

from .kernel import land
from .naive import naive_land

__all__ = ["land", "naive_land"]
