"""Metadata that a user puts in the place of a GGUF file's: KEY=TYPE:VALUE, as llama.cpp writes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from hybrimoe_kt.errors import ConfigError, unknown_name

__all__ = ["overridden", "parse_overrides"]


def _truth(text: str) -> bool:
    return {"true": True, "false": False}[text]


_TYPES: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "bool": _truth, "str": str}


def parse_overrides(texts: Iterable[str]) -> dict[str, Any]:
    """Read `KEY=TYPE:VALUE`, several of them in one text apart by commas; ConfigError for anything else."""
    found: dict[str, Any] = {}
    for text in (part for whole in texts for part in whole.split(",") if part):
        key, equals, typed = text.partition("=")
        kind, colon, value = typed.partition(":")
        if not (key and equals and colon):
            raise ConfigError(f"--override-kv {text}: write KEY=TYPE:VALUE, as in qwen3moe.expert_used_count=int:4")
        if kind not in _TYPES:
            raise ConfigError(f"--override-kv {text}: {unknown_name('type', kind, _TYPES)}")
        try:
            found[key] = _TYPES[kind](value)
        except (ValueError, KeyError):
            raise ConfigError(f"--override-kv {text}: {value!r} is no {kind}") from None
    return found


def overridden(metadata: Mapping[str, Any], changes: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Return the metadata with `changes` in it; ConfigError where one is of another type than what the file has."""
    for key, value in changes.items():
        before = metadata.get(key, value)
        if isinstance(before, list) and key.startswith("tokenizer."):
            raise ConfigError(f"--override-kv {key}: {file.name} has a list there, which one value cannot replace")
        kinds = [_kind(each) for each in (before[:1] if isinstance(before, list) else [before])]
        if kinds and _kind(value) not in kinds and not (kinds == ["float"] and _kind(value) == "int"):
            raise ConfigError(f"--override-kv {key}: {file.name} has {kinds[0]} there, not {_kind(value)}")
    return {**metadata, **changes}


def _kind(value: Any) -> str:
    return next(
        name
        for name, kind in (("bool", bool), ("int", int), ("float", float), ("str", object))
        if isinstance(value, kind)
    )
