"""Gate and up projections and SiLU of a few tokens' experts."""

from .kernel import decode_gate_up
from .naive import naive_decode_gate_up

__all__ = ["decode_gate_up", "naive_decode_gate_up"]
