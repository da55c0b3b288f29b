"""Reference of the copies, for addresses in host memory."""

from __future__ import annotations

import ctypes

import torch

from hybrimoe_kt.kernels.plan_tables import SlotAddresses

__all__ = ["naive_fetch"]


def naive_fetch(copies: torch.Tensor, addresses: SlotAddresses, place: int = 0) -> None:
    """Bring `copies`; arguments as of `fetch`."""
    for *layer, expert, slot, _ in copies.tolist():
        if expert < 0:
            continue
        at = layer[0] if layer else place
        source, target, size = (int(part[at]) for part in (addresses.sources, addresses.targets, addresses.slot_bytes))
        ctypes.memmove(target + slot * size, source + expert * size, size)
