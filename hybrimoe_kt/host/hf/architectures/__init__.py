"""Model families as data: how a GGUF architecture becomes a Transformers configuration and its tensor names.

A family is one entry in its module's `FAMILIES`, and a module of this folder that has any is found. Adding one means
describing it there, not branching elsewhere: rules, tokenizer and checkpoints ask the entry.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass

from hybrimoe_kt.errors import ModelError, unknown_name
from hybrimoe_kt.weights.gguf_file import GgufFile

from .base import Architecture, Composed, Key, LayerKind, Transform

__all__ = [
    "ARCHITECTURES",
    "REFUSED",
    "Architecture",
    "Composed",
    "Key",
    "LayerKind",
    "Refused",
    "Transform",
    "architecture_of",
    "architecture_of_type",
    "every_architecture",
]


def _families() -> Iterator[Architecture]:
    """Of every module here that has any."""
    for name in sorted(module.name for module in pkgutil.iter_modules(__path__)):
        yield from getattr(importlib.import_module(f"{__name__}.{name}"), "FAMILIES", ())


ARCHITECTURES: dict[str, Architecture] = {family.gguf: family for family in _families()}


@dataclass(frozen=True, slots=True)
class Refused:
    """A family that cannot be run here."""

    reason: str
    """Ends the sentence "... is not supported: "."""
    model_types: tuple[str, ...]
    """What Transformers calls it."""


REFUSED = {
    "longcat-flash": Refused(
        "some of its experts are none and pass on what they are given, and llama.cpp has no files of it",
        ("longcat_flash",),
    ),
}
"""By the name of the architecture in GGUF files."""


def every_architecture() -> Iterator[Architecture]:
    """Every entry, the variants after the one that chooses among them."""
    for family in ARCHITECTURES.values():
        yield family
        yield from family.variants.values()


def architecture_of(file: GgufFile) -> Architecture:
    """Return the family of a file; an unsupported one, or one without routed experts, is a ModelError."""
    name = file.architecture
    if name in REFUSED:
        raise ModelError(
            f"{file.path}: architecture {name!r} is not supported: {REFUSED[name].reason}; use llama.cpp for it"
        )
    if name not in ARCHITECTURES:
        message = unknown_name("architecture", name, ARCHITECTURES)
        raise ModelError(f"{file.path}: {message}")
    if not file.metadata.get(f"{name}.expert_count"):
        raise ModelError(
            f"{file.path}: a dense {name} model without experts; this program runs Mixture-of-Experts models"
        )
    family = ARCHITECTURES[name]
    return family.variants.get(family.variant(file, family.key(file)), family)


def architecture_of_type(path: str, model_type: str) -> Architecture:
    """Return the family of a Transformers model type; an unsupported one is a ModelError."""
    types: dict[str, Architecture] = {}
    for family in every_architecture():
        types.setdefault(family.model_type, family)
    refused = next((family for family in REFUSED.values() if model_type in family.model_types), None)
    if refused is not None:
        raise ModelError(f"{path}: model type {model_type!r} is not supported: {refused.reason}; use llama.cpp for it")
    if model_type not in types:
        raise ModelError(f"{path}: {unknown_name('model type', model_type, types)}")
    return types[model_type]
