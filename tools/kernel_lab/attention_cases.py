"""Every configuration of attention's kernels, and what each claims of its machine code."""

from __future__ import annotations

from collections.abc import Iterator

from hybrimoe_kt.kernels.attention_configs import AttentionConfig, attention_config, latent_config, merge_config
from hybrimoe_kt.kernels.targets import Target

from .cases import Case, Claims, Work

__all__ = ["attention_cases"]

_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}
_WIDTHS = (64, 96, 128, 256)
_RANK, _ROPE = 512, 64
"""DeepSeek's."""
_MIXED = (("fp16", "bf16"), ("fp32", "bf16"))
"""Rooms, and queries of another dtype."""


def attention_cases(target: Target) -> list[Case]:
    """Return every case of a target: queries in the dtype of keys and values, and in others at two widths."""
    alike = tuple((kind, kind) for kind in _BYTES)
    shapes = [(width, *pair) for width in _WIDTHS for pair in alike]
    shapes += [(width, *pair) for width in (128, 256) for pair in _MIXED]
    grouped = [case for shape in shapes for case in _grouped(target, *shape)]
    return [*grouped, *(case for pair in (*alike, *_MIXED) for case in _latent(target, *pair)), *_merge(target)]


def _grouped(target: Target, width: int, kind: str, query: str) -> Iterator[Case]:
    config = attention_config(target, 8, width, _BYTES[kind], converts=kind != query)
    if config is None:
        return
    constants = (("WIDTH", width), ("COLUMNS", config.columns), ("HEADS", config.heads), ("BLOCK", config.block))
    pointers = (("query", f"*{query}"), ("keys", f"*{kind}"), ("values", f"*{kind}"))
    claims, work = _claims(target, config, kind, query, 2 * config.columns, 2 * width)
    shared = (*pointers, ("length", "*i64"), ("factor", "fp32"))
    variant = _variant(width, kind, query)
    yield Case("decode_attention", variant, constants, shared, config.num_warps, config.num_stages, claims, work)


def _variant(width: int, kind: str, query: str) -> str:
    return f"{width} {kind}" if kind == query else f"{width} {kind} of {query}"


def _claims(
    target: Target, config: AttentionConfig, kind: str, query: str, loaded: int, read: int
) -> tuple[Claims, Work]:
    """For so many numbers a token, of which `read` are not masked: 16 bytes a load, each of them once.

    Of float32 products little is claimed: where there are no tensor cores for them, the loops are of other shapes.
    """
    if query == "fp32":
        return Claims(wide_loads=2), Work()
    threads = config.num_warps * target.warp_size
    loads = config.block * loaded * _BYTES[kind] // (16 * threads)
    return Claims(wide_loads=loads, tensor=True), Work(config.block * read * _BYTES[kind])


def _latent(target: Target, kind: str, query: str) -> Iterator[Case]:
    config = latent_config(target, 16, _RANK, _BYTES[kind], converts=kind != query)
    if config is None:
        return
    constants = (("RANK", _RANK), ("COLUMNS", config.columns), ("ROPE", _ROPE), ("ROPE_COLUMNS", _ROPE))
    shape = (("HEADS", config.heads), ("BLOCK", config.block))
    kinds = (("query", query), ("rotated_query", query), ("latents", kind), ("rotated", kind))
    pointers = (*((name, f"*{each}") for name, each in kinds), ("length", "*i64"), ("factor", "fp32"))
    claims, work = _claims(target, config, kind, query, config.columns + _ROPE, _RANK + _ROPE)
    variant = _variant(_RANK, kind, query)
    yield Case(
        "latent_attention", variant, constants + shape, pointers, config.num_warps, config.num_stages, claims, work
    )


def _merge(target: Target) -> Iterator[Case]:
    config = merge_config(target, 128)
    constants = (("BLOCK", 64), ("TOGETHER", config.splits), ("COLUMNS", config.columns))
    for kind in _BYTES:
        pointers = (("length", "*i64"), ("sinks", "*fp32"), ("factor", "fp32"), ("out", f"*{kind}"))
        yield Case("merge_splits", kind, constants, pointers, config.num_warps, 3, Claims(wide_loads=1), Work())
