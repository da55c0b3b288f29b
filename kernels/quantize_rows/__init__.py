"""Activations to int8 in blocks of 32."""

from .kernel import quantize_rows
from .naive import naive_quantize_rows

__all__ = ["naive_quantize_rows", "quantize_rows"]
