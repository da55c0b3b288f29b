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
    """What Transformers calls it, if it has a model of it."""


REFUSED = {
    "phimoe": Refused(
        "it chooses two experts one after the other and normalises with a mean, and llama.cpp does neither", ("phimoe",)
    ),
    "jamba": Refused("most of its layers are state spaces of Mamba's first kind, which nothing here reads", ("jamba",)),
    "dbrx": Refused(
        "its layers and experts are called otherwise in Transformers, and queries, keys and values are cut together",
        ("dbrx",),
    ),
    "hy_v4": Refused(
        "it keeps several streams of hidden states and mixes them in a way that nothing here reads",
        ("hy_v4", "hy_v4_vl", "hy_v4_vl_text"),
    ),
    "glm5-next": Refused(
        "it has linear attention between several streams of hidden states, which nothing here reads together",
        ("glm5_next", "glm5_next_text"),
    ),
    "minimax-01": Refused("its linear attention decays at fixed rates, which nothing here reads", ("minimax",)),
    "ernie4_5-vl-moe": Refused(
        "it has other experts for pictures than for text, and llama.cpp has no files of it",
        ("ernie4_5_vl_moe", "ernie4_5_vl_moe_text"),
    ),
    "kimi-k3": Refused("Transformers has no model of it, whose layers also read what all earlier ones left", ()),
    "smallthinker": Refused("Transformers has no model of it, whose routers choose in front of attention", ()),
    "grovemoe": Refused("Transformers has no model of it, whose experts share smaller ones by groups", ()),
    "llada-moe": Refused("it writes by uncovering masked words, where this program writes one token after another", ()),
    "rnd1": Refused("it writes by uncovering masked words, where this program writes one token after another", ()),
    **{name: Refused("Transformers has no model of it", ()) for name in ("arctic", "deepseek", "grok")},
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
