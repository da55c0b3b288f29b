"""Down projection of many tokens' experts."""

from .kernel import prefill_down
from .naive import naive_prefill_down

__all__ = ["naive_prefill_down", "prefill_down"]
