"""Sizes as people write them: bytes, and how much of a model's experts a cache holds."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from .errors import ConfigError

__all__ = ["CacheSize", "parse_bytes", "size_text"]

BYTE_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
BYTE_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}

_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?b)", re.IGNORECASE)


def parse_bytes(text: str) -> int | None:
    """Return "12GiB" or "500 MB" as bytes, None when `text` is not written that way."""
    match = _BYTES.fullmatch(text.strip())
    return int(float(match[1]) * BYTE_UNITS[match[2].upper()]) if match else None


def size_text(num_bytes: int | None) -> str:
    """Write 1610612736 as "1.5 GiB", and None as "unknown"."""
    if num_bytes is None:
        return "unknown"
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.1f} {name}"
    return f"{num_bytes} bytes"


@dataclass(frozen=True, slots=True)
class CacheSize:
    """How many experts may live on the accelerator: exactly one field is set, none means "auto".

    `per_layer` is a number of slots in each MoE layer, `fraction` a share of all routed experts (0..1),
    `num_bytes` a budget over all layers. "auto" is what fits in the accelerator's free memory.
    """

    per_layer: int | None = None
    fraction: float | None = None
    num_bytes: int | None = None

    @classmethod
    def parse(cls, value: Any) -> CacheSize:
        """Read a count (8), a share (0.25, "25%", "all"), bytes ("12GiB") or "auto"; else ConfigError."""
        if isinstance(value, CacheSize):
            return value
        if isinstance(value, bool):
            return cls._refuse(value)
        if isinstance(value, int):
            return cls(per_layer=value) if value >= 0 else cls._refuse(value)
        if isinstance(value, float):
            return cls(fraction=value) if 0.0 <= value <= 1.0 else cls._refuse(value)
        return cls._parse_text(str(value).strip())

    @classmethod
    def _parse_text(cls, text: str) -> CacheSize:
        word = text.lower()
        if word in ("auto", "all"):
            return cls(fraction=1.0) if word == "all" else cls()
        if not text.isascii() or len(text) > 24:
            return cls._refuse(text)
        if text.isdigit():
            return cls(per_layer=int(text))
        if text.endswith("%") and _is_number(text[:-1]) and 0 <= float(text[:-1]) <= 100:
            return cls(fraction=float(text[:-1]) / 100)
        if _is_number(text) and 0.0 <= float(text) <= 1.0:
            return cls(fraction=float(text))
        num_bytes = parse_bytes(text)
        return cls(num_bytes=num_bytes) if num_bytes is not None else cls._refuse(text)

    @staticmethod
    def _refuse(value: Any) -> CacheSize:
        raise ConfigError(
            f"cache size {value!r} is not understood: give experts per layer (8), a share (0.25, 25%, all), "
            f"bytes (12GiB) or auto"
        )


def _is_number(text: str) -> bool:
    return re.fullmatch(r"\d+(\.\d*)?|\.\d+", text) is not None
