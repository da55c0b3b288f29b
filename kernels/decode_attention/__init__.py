"""Attention of one token to keys and values whose number stands on the device."""

from .kernel import decode_attention
from .naive import naive_decode_attention

__all__ = ["decode_attention", "naive_decode_attention"]
