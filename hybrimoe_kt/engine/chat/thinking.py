"""Whether and how hard a model is to think, in the words of its chat template."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["EFFORTS", "SWITCHES", "effort_options", "switch_options", "takes_thinking"]

EFFORTS = ("none", "low", "medium", "high")
SWITCHES = ("enable_thinking", "thinking")
"""Variables of chat templates that turn thoughts on and off; a template has one of them at most."""

Takes = Callable[[str], bool]
"""Whether the chat template reads a variable."""


def effort_options(takes: Takes, effort: str) -> dict[str, Any] | None:
    """Return the chat template's options for an effort, None where it has none such.

    A template with a switch alone takes "none", and "medium": to do as it does, or to think where it would not.
    """
    if takes("reasoning_effort"):
        return {"reasoning_effort": effort}
    if effort == "none":
        return switch_options(takes, is_on=False)
    if effort in ("medium", ""):
        return {"thinking": True} if effort and takes("thinking") else {}
    return None


def switch_options(takes: Takes, *, is_on: bool) -> dict[str, Any] | None:
    """Return the option that turns thoughts on or off, None where the chat template has none."""
    name = next(filter(takes, SWITCHES), None)
    return None if name is None else {name: is_on}


def takes_thinking(takes: Takes) -> bool:
    """Whether the chat template lets one choose how the model thinks."""
    return any(map(takes, (*SWITCHES, "reasoning_effort")))
