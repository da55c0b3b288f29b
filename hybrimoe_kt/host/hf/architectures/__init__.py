"""Model families as data: how a GGUF architecture becomes a Transformers configuration and its tensor names.

A family is one entry in its module's `FAMILIES`. Adding one means describing it there, not branching elsewhere:
rules, tokenizer and checkpoints ask the entry.
"""

from __future__ import annotations

from collections.abc import Iterator

from hybrimoe_kt.errors import ModelError, unknown_name
from hybrimoe_kt.weights.gguf_file import GgufFile

from . import deepseek, openai, others, qwen
from .base import Architecture, Composed, Key, Transform

__all__ = [
    "ARCHITECTURES",
    "REFUSED",
    "Architecture",
    "Composed",
    "Key",
    "Transform",
    "architecture_of",
    "architecture_of_type",
    "every_architecture",
]

ARCHITECTURES: dict[str, Architecture] = {
    family.gguf: family for family in (*qwen.FAMILIES, *deepseek.FAMILIES, *openai.FAMILIES, *others.FAMILIES)
}

REFUSED = {
    "llama4": "Transformers scales what enters its experts, not what leaves them, and runs every expert on every token",
}
"""Architectures that cannot be run here -> why."""


def every_architecture() -> Iterator[Architecture]:
    """Every entry, the variants after the one that chooses among them."""
    for family in ARCHITECTURES.values():
        yield family
        yield from family.variants.values()


def architecture_of(file: GgufFile) -> Architecture:
    """Return the family of a file; an unsupported one, or one without routed experts, is a ModelError."""
    name = file.architecture
    if name in REFUSED:
        raise ModelError(f"{file.path}: architecture {name!r} is not supported: {REFUSED[name]}; use llama.cpp for it")
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
    types = {family.model_type: family for family in every_architecture()}
    refused = next((name for name in REFUSED if model_type.replace("_", "-").startswith(name)), None)
    if refused is not None:
        raise ModelError(
            f"{path}: model type {model_type!r} is not supported: {REFUSED[refused]}; use llama.cpp for it"
        )
    if model_type not in types:
        raise ModelError(f"{path}: {unknown_name('model type', model_type, types)}")
    return types[model_type]
