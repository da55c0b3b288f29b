"""Who asks: what limits of each client go by."""

from __future__ import annotations

from contextvars import ContextVar

__all__ = ["client_of_request"]

client_of_request: ContextVar[str] = ContextVar("client_of_request", default="")
"""Of the request at hand: its address."""
