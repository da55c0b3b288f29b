"""Rows divided by their root mean square, perhaps of a sum."""

from .kernel import rms_norm
from .naive import naive_rms_norm

__all__ = ["naive_rms_norm", "rms_norm"]
