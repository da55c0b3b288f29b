"""What torch's allocator keeps of a device's memory for later, given back while it is needed elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

__all__ = ["give_back_unused"]


def give_back_unused(devices: Iterable[torch.device]) -> None:
    """Return every block that holds nothing to the drivers of `devices`: it may be had again in another size.

    Waits for the devices' work. A host has no such store.
    """
    for device in set(devices):
        module: Any = getattr(torch, device.type, None)
        if hasattr(module, "empty_cache"):
            with module.device(device):
                module.empty_cache()
