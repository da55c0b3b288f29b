"""Gate and up projections and SiLU of many tokens' experts."""

from .kernel import prefill_gate_up
from .naive import naive_prefill_gate_up

__all__ = ["naive_prefill_gate_up", "prefill_gate_up"]
