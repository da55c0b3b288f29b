"""Standard streams that are closed, or that cannot be written."""

from __future__ import annotations

import contextlib
import os
import sys

__all__ = ["discard_output", "open_closed_streams"]


def discard_output() -> None:
    """Send what is still to be written nowhere, or the interpreter complains about it at exit."""
    with contextlib.suppress(OSError, AttributeError):  # no file behind standard output
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def open_closed_streams() -> None:
    """Give a stream that our starter closed the null device, which also keeps its number from other files."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
