"""What torch's allocator keeps of a device's memory for later, given back while it is needed elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

__all__ = ["give_back_unused", "is_out_of_memory"]

_OUT_OF_MEMORY = "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "HIP error: out of memory"


def give_back_unused(devices: Iterable[torch.device]) -> None:
    """Return every block that holds nothing to the drivers of `devices`: it may be had again in another size.

    Waits for the devices' work. A host has no such store.
    """
    for device in set(devices):
        module: Any = getattr(torch, device.type, None)
        if hasattr(module, "empty_cache"):
            with module.device(device):
                module.empty_cache()


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch's allocator, or a library that takes memory of its own when it is first used, found none."""
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError) or any(words in said for words in _OUT_OF_MEMORY)
