"""Routers' products in float32."""

from .kernel import router_logits
from .naive import naive_router_logits

__all__ = ["naive_router_logits", "router_logits"]
