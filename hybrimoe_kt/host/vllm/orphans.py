"""Lets a rank end with the server that it belongs to.

vLLM's engine and its ranks outlive a server that is killed outright, and with them what they hold: experts, slots,
locked pages. A server that comes in their place then finds neither memory nor cores.
"""

from __future__ import annotations

import os
import threading
import time

import psutil
from vllm.logger import init_logger

__all__ = ["end_with_server"]

logger = init_logger("vllm.hybrimoe")

_EVERY_S = 1.0
_ENGINE = "VLLM::EngineCore"
"""What vLLM calls the process between server and ranks."""


def end_with_server() -> None:
    """Watch from now on whether this process, or the engine that started it, has lost its parent; end it then."""
    watched = _started_by_server()
    if watched:
        threading.Thread(target=_watch, args=(watched,), name="server still there", daemon=True).start()


def _started_by_server() -> dict[int, int]:
    """Process -> its parent: this one and an engine above it, as far as vLLM has started them."""
    own = psutil.Process()
    parent = own.parent()
    if not own.name().startswith("VLLM::") or parent is None:
        return {}
    found = {own.pid: parent.pid}
    if parent.name().startswith(_ENGINE[:15]):  # as much as the system keeps of a name
        found[parent.pid] = parent.ppid()
    return found


def _watch(watched: dict[int, int]) -> None:
    while all(_parent_of(process) == parent for process, parent in watched.items()):
        time.sleep(_EVERY_S)
    logger.error("the server that this rank belongs to is gone; it ends")
    os._exit(1)


def _parent_of(process: int) -> int:
    try:
        return psutil.Process(process).ppid()
    except psutil.NoSuchProcess:
        return -1
