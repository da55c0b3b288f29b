"""Ctrl-C while a model computes: it asks for an end, and nothing is torn apart in the middle of a step."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

__all__ = ["INTERRUPTED", "Abandoned", "interrupt_sets"]

INTERRUPTED = 130
"""What a shell reports for a program ended by Ctrl-C."""


class Abandoned(Exception):
    """The user insisted on leaving in the middle of a step."""


@contextlib.contextmanager
def interrupt_sets(stop: threading.Event) -> Iterator[None]:
    """Let Ctrl-C set `stop` instead of raising; the third press leaves the program.

    The engine looks at `stop` between tokens. Outside the main thread, where no signal arrives, nothing changes.
    """
    presses = 0

    def on_interrupt(signal_number: int, frame: Any) -> None:
        nonlocal presses
        presses += 1
        if presses == 2:
            os.write(2, b"\r\nfinishing the current step; Ctrl-C once more leaves the program\r\n")
        if presses > 2:
            raise Abandoned
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
