"""Whole experts brought from host memory into slots."""

from .kernel import fetch
from .naive import naive_fetch

__all__ = ["fetch", "naive_fetch"]
