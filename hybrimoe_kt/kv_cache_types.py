"""What keys and values can be kept in: the one table that options, graphs, caches and memory plans ask."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from .errors import ConfigError, unknown_name

__all__ = ["BLOCK_VALUES", "KV_CACHE_TYPES", "KvCacheType", "check_kv_cache_type"]

BLOCK_VALUES = 32
"""Numbers of a block of q8_0, which share a float16 scale."""


class KvCacheType(NamedTuple):
    """One way of keeping numbers."""

    value_bytes: float | None
    """Of a number; None: as the model's dtype has it."""
    dtype: str | None = None
    """torch's name of it; None: the model's own, or blocks."""


KV_CACHE_TYPES = {
    "auto": KvCacheType(None),
    "f16": KvCacheType(2.0, "float16"),
    "bf16": KvCacheType(2.0, "bfloat16"),
    "f32": KvCacheType(4.0, "float32"),
    "q8_0": KvCacheType(1 + 2 / BLOCK_VALUES),
}
"""auto is f16 in ggml's graphs, and the model's dtype elsewhere."""


def check_kv_cache_type(name: str, valid: Collection[str] = tuple(KV_CACHE_TYPES)) -> None:
    """ConfigError for a type that keys and values are not kept in."""
    if name not in valid:
        raise ConfigError(unknown_name("kv_cache_type", name, valid))
