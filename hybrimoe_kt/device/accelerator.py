"""Where slots live: memory on a device, and copies into it.

One class serves every device through torch's own API; "emulated" is the same code with the slots in host
memory, so that a machine without an accelerator runs the same path. Copies are synchronous.
"""

from __future__ import annotations

import logging

import torch

from hybrimoe_kt.errors import CapacityError, ConfigError

__all__ = ["Accelerator", "choose_accelerator"]

logger = logging.getLogger(__name__)

RESERVE_BYTES = 2**30
"""Left free by `auto`: activations, KV cache growth and the libraries' own buffers. An assumption, not measured."""


class Accelerator:
    """One device that holds slots."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.name, self.device = name, device

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """Return `num_bytes` of uninitialised device memory, uint8; CapacityError when there is not enough."""
        try:
            return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        except (RuntimeError, MemoryError):
            raise CapacityError(
                f"{num_bytes / 1e9:.2f} GB for the expert cache do not fit on {self.device}; give a smaller cache_size"
            ) from None

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy host bytes to device bytes; complete when this returns."""
        target.copy_(source)

    def free_bytes(self) -> int:
        """Memory that could be allocated now."""
        if self.device.type == "cuda":
            return int(torch.cuda.mem_get_info(self.device)[0])
        if self.device.type == "xpu":
            return int(torch.xpu.mem_get_info(self.device)[0])
        return _host_available_bytes()

    def auto_budget_bytes(self) -> int:
        """What `cache_size: auto` may use: half of host memory when emulated, else all but a reserve."""
        free = self.free_bytes()
        return free // 2 if self.device.type == "cpu" else max(0, free - RESERVE_BYTES)


def choose_accelerator(name: str) -> Accelerator | None:
    """Return the accelerator a user named, None for "none"; "auto" takes CUDA or XPU when present."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "xpu" if torch.xpu.is_available() else "none"
    if name == "none":
        return None
    if name == "emulated":
        return Accelerator("emulated", torch.device("cpu"))
    device = torch.device(name)
    available = {"cuda": torch.cuda, "xpu": torch.xpu}[device.type]
    if not available.is_available():
        raise ConfigError(
            f"accelerator {name!r} was asked for, but torch finds none on this machine; use none or emulated"
        )
    if device.index is not None and device.index >= available.device_count():
        raise ConfigError(f"accelerator {name!r}: this machine has {available.device_count()} of them")
    return Accelerator(name, device)


def _host_available_bytes() -> int:
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        import os

        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
