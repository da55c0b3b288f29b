"""From a name to an accelerator."""

from __future__ import annotations

import importlib
from operator import attrgetter

import torch

from hybrimoe_kt.accelerators import numbered, parse

from .accelerator import Accelerator

__all__ = ["choose_accelerator", "device_at", "found", "nothing"]


def choose_accelerator(name: str) -> Accelerator | None:
    """Return the accelerator a user named, see `hybrimoe_kt.accelerators`, None for "none"; "auto" takes what is found.

    ConfigError for a name that is no accelerator's, and for one that this machine lacks.
    """
    kind, groups = parse(name)
    module, _, function = kind.maker.partition(":")
    made: Accelerator | None = attrgetter(function)(importlib.import_module(module))(name, *groups)
    return made


def device_at(place: str) -> torch.device:
    """The torch device of a place that a rule may name: that of "cuda:1" itself, of "emulated:0" the CPU."""
    device = numbered(place)
    return torch.device(place if device is None or device.torch_type != "cpu" else "cpu")


def found(name: str) -> Accelerator | None:
    """What torch finds on this machine."""
    return choose_accelerator("cuda" if torch.cuda.is_available() else "xpu" if torch.xpu.is_available() else "none")


def nothing(name: str) -> None:
    """No accelerator at all."""
