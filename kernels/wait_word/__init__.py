"""A stream's wait for a word that the host writes."""

from .kernel import wait_word
from .naive import naive_wait_word

__all__ = ["naive_wait_word", "wait_word"]
