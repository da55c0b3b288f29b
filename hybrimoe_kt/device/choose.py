"""From a name to an accelerator."""

from __future__ import annotations

import re

import torch

from hybrimoe_kt.errors import ConfigError

from .accelerator import Accelerator
from .emulated.adversarial import AdversarialAccelerator
from .emulated.adversary import Adversary
from .emulated.immediate import ImmediateAccelerator
from .emulated.timed import TimedAccelerator
from .torch_accelerator import TorchAccelerator

__all__ = ["choose_accelerator"]

_EMULATED = re.compile(r"emulated(?::(?:\d+|(adversarial)(?::(\d+))?|(timed)(?::(.+))?))?")


def choose_accelerator(name: str) -> Accelerator | None:
    """Return the accelerator a user named (see `config.ACCELERATORS`), None for "none"; "auto" takes CUDA or XPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "xpu" if torch.xpu.is_available() else "none"
    if name == "none":
        return None
    if emulated := _EMULATED.fullmatch(name):
        adversarial, seed, timed, profile = emulated.groups()
        if adversarial:
            return AdversarialAccelerator(Adversary(int(seed or 0)), name)
        return TimedAccelerator.named(name, profile or "default") if timed else ImmediateAccelerator(name)
    return _hardware(name)


def _hardware(name: str) -> TorchAccelerator:
    device = torch.device(name)
    available = {"cuda": torch.cuda, "xpu": torch.xpu}[device.type]
    if not available.is_available():
        raise ConfigError(
            f"accelerator {name!r} was asked for, but torch finds none on this machine; use none or emulated"
        )
    if device.index is not None and device.index >= available.device_count():
        raise ConfigError(f"accelerator {name!r}: this machine has {available.device_count()} of them")
    return TorchAccelerator(name, device)
