"""Weights that the CPU reads in place, brought into memory at once instead of page by page when they are first used."""

from __future__ import annotations

import ctypes
import logging
import mmap
import sys
from collections.abc import Iterable, Sequence

import torch

from hybrimoe_kt.device.emulated.immediate import host_available_bytes
from hybrimoe_kt.device.experts import LayerExperts
from hybrimoe_kt.device.inspect_machine import inspect_memory

__all__ = ["bring_in"]

logger = logging.getLogger(__name__)

_POPULATE_READ = 22  # MADV_POPULATE_READ, from Linux 5.14 on; Python has no name for it
_LEFT_BYTES = 2**31
"""Of available memory, for the KV cache, steps and other programs: without them the kernel would drop again what was
just read. An assumption, not measured."""


def bring_in(layers: Sequence[LayerExperts], dense: Sequence[torch.Tensor] = (), *, progress: bool) -> int:
    """Map every page of `dense` and `layers` and read what is not in memory; return how many bytes that covered.

    Fewer where the system cannot, none where they would not fit with room to spare: then pages come as they are used.
    """
    needed = sum(layer.expert_bytes * layer.num_experts for layer in layers) + sum(data.numel() for data in dense)
    if needed + _LEFT_BYTES > _room_bytes():
        logger.debug(
            "%.1f GB of weights do not fit in free memory; their pages are read as they are used", needed / 1e9
        )
        return 0
    done = 0
    for data in dense:
        if not _populate(data.data_ptr(), data.numel()):
            return done
        done += data.numel()
    for layer in _shown(layers, progress):
        for matrix in layer.tensors.values():
            if not _populate(matrix.data.data_ptr(), matrix.data.numel()):
                return done
            done += matrix.data.numel()
    return done


def _room_bytes() -> int:
    limit = inspect_memory()["container_limit_bytes"]
    return min(host_available_bytes(), limit) if limit is not None else host_available_bytes()


def _populate(address: int, num_bytes: int) -> bool:
    """Bring in a range's pages, other threads running meanwhile; False where the kernel does not."""
    if sys.platform != "linux":  # the number means something else there, or nothing
        return False
    first = address // mmap.PAGESIZE * mmap.PAGESIZE
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    if madvise(first, address + num_bytes - first, _POPULATE_READ) == 0:
        return True
    logger.debug("madvise: error %d; pages are read as they are used", ctypes.get_errno())
    return False


def _shown(layers: Sequence[LayerExperts], progress: bool) -> Iterable[LayerExperts]:
    from tqdm.auto import tqdm

    shown: Iterable[LayerExperts] = tqdm(
        layers, desc="reading experts", unit="layer", disable=not (progress and sys.stderr.isatty())
    )
    return shown
