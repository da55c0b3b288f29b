"""What an accelerator may be called, and who makes it: the one table that options, rules, placement and help ask.

A kind is added by a row here and a class that keeps `device.accelerator.Accelerator`'s promises.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from .errors import ConfigError, nearest

__all__ = ["ACCELERATORS", "Kind", "Numbered", "forms", "is_host", "numbered", "parse"]


class Kind(NamedTuple):
    """One way of naming an accelerator."""

    form: str
    """As help and errors show it."""
    pattern: str
    """What a whole name matches; `maker` gets the groups."""
    maker: str
    """`module:function`, called with the name and the pattern's groups; returns an `Accelerator`, None for none."""
    torch_type: str | None = None
    """Type of the torch device that a numbered one is: where a rule may place layers."""


_DEVICE = "hybrimoe_kt.device."
ACCELERATORS = [
    Kind("auto", "auto", f"{_DEVICE}choose:found"),
    Kind("none", "none", f"{_DEVICE}choose:nothing"),
    Kind("emulated[:N]", r"emulated(?::\d{1,3})?", f"{_DEVICE}emulated.immediate:ImmediateAccelerator", "cpu"),
    Kind(
        "emulated:adversarial[:SEED]",
        r"emulated:adversarial(?::(\d{1,9}))?",
        f"{_DEVICE}emulated.adversarial:AdversarialAccelerator.named",
    ),
    Kind("emulated:timed[:PROFILE]", r"emulated:timed(?::(.+))?", f"{_DEVICE}emulated.timed:TimedAccelerator.named"),
    Kind("cuda[:N]", r"cuda(?::\d{1,3})?", f"{_DEVICE}torch_accelerator:TorchAccelerator.named", "cuda"),
    Kind("xpu[:N]", r"xpu(?::\d{1,3})?", f"{_DEVICE}torch_accelerator:TorchAccelerator.named", "xpu"),
]


_MEANT = {"gpu": "cuda", "rocm": "cuda", "hip": "cuda", "nvidia": "cuda", "cpu": "none", "off": "none"}
"""What people write for them."""


class Numbered(NamedTuple):
    """An accelerator that layers may be placed on."""

    kind: str
    number: int | None
    torch_type: str


def forms() -> str:
    """Every valid form, for help and errors."""
    return ", ".join(kind.form for kind in ACCELERATORS)


def parse(name: str) -> tuple[Kind, tuple[str | None, ...]]:
    """Return the kind that `name` is of, and what it says beside; ConfigError naming the nearest if it is of none."""
    for kind in ACCELERATORS:
        if match := re.fullmatch(kind.pattern, name):
            return kind, match.groups()
    known = [kind.form.split("[")[0] for kind in ACCELERATORS]
    hint = nearest(_MEANT.get(name.lower(), name.lower()), known)
    raise ConfigError(f"unknown accelerator {name!r}{hint or ';'} valid: {forms()}")


def numbered(name: str) -> Numbered | None:
    """Read "cuda:1", "xpu" or "emulated:0"; None for what no layer can be placed on."""
    match = re.fullmatch(r"(\w+)(?::(\d{1,3}))?", name)
    kind = next((kind for kind in ACCELERATORS if kind.torch_type and re.fullmatch(kind.pattern, name)), None)
    if match is None or kind is None or kind.torch_type is None:
        return None
    return Numbered(match[1], None if match[2] is None else int(match[2]), kind.torch_type)


def is_host(place: str) -> bool:
    """Whether what is placed there stands in host memory and the CPU computes it: "cpu", and not "emulated:0"."""
    return place.partition(":")[0] == "cpu"
