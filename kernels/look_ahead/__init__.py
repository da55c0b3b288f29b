"""Copies ordered ahead of need: into later layers by their gates' guesses, and into this one for later tokens."""

from .kernel import look_ahead
from .naive import naive_look_ahead

__all__ = ["look_ahead", "naive_look_ahead"]
