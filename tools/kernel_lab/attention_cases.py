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


def attention_cases(target: Target) -> list[Case]:
    """Return every case of a target: queries in the dtype of keys and values, and a pair of two."""
    pairs = [(width, kind, kind) for width in _WIDTHS for kind in _BYTES]
    grouped = [case for pair in (*pairs, (128, "fp16", "bf16")) for case in _grouped(target, *pair)]
    return [*grouped, *(case for kind in _BYTES for case in _latent(target, kind)), *_merge(target)]


def _grouped(target: Target, width: int, kind: str, query: str) -> Iterator[Case]:
    config = attention_config(target, 8, width, _BYTES[kind])
    if config is None:
        return
    constants = (("WIDTH", width), ("COLUMNS", config.columns), ("HEADS", config.heads), ("BLOCK", config.block))
    pointers = (("query", f"*{query}"), ("keys", f"*{kind}"), ("values", f"*{kind}"))
    variant = f"{width} {kind}" if kind == query else f"{width} {kind} of {query}"
    claims, work = _claims(target, config, kind, 2 * config.columns, 2 * width)
    shared = (*pointers, ("length", "*i64"), ("factor", "fp32"))
    yield Case("decode_attention", variant, constants, shared, config.num_warps, config.num_stages, claims, work)


def _claims(target: Target, config: AttentionConfig, kind: str, loaded: int, read: int) -> tuple[Claims, Work]:
    """For so many numbers a token, of which `read` are not masked: 16 bytes a load, each of them once.

    Of float32 little is claimed: where there are no tensor cores for it, the loops are of other shapes.
    """
    if kind == "fp32":
        return Claims(wide_loads=2), Work()
    threads = config.num_warps * target.warp_size
    loads = config.block * loaded * _BYTES[kind] // (16 * threads)
    return Claims(wide_loads=loads, tensor=True), Work(config.block * read * _BYTES[kind])


def _latent(target: Target, kind: str) -> Iterator[Case]:
    config = latent_config(target, 16, _RANK, _BYTES[kind])
    if config is None:
        return
    constants = (("RANK", _RANK), ("COLUMNS", config.columns), ("ROPE", _ROPE), ("ROPE_COLUMNS", _ROPE))
    shape = (("HEADS", config.heads), ("BLOCK", config.block))
    kinds = ("query", "rotated_query", "latents", "rotated")
    pointers = (*((name, f"*{kind}") for name in kinds), ("length", "*i64"), ("factor", "fp32"))
    claims, work = _claims(target, config, kind, config.columns + _ROPE, _RANK + _ROPE)
    variant = f"{_RANK} {kind}"
    yield Case(
        "latent_attention", variant, constants + shape, pointers, config.num_warps, config.num_stages, claims, work
    )


def _merge(target: Target) -> Iterator[Case]:
    config = merge_config(target, 128)
    constants = (("BLOCK", 64), ("TOGETHER", config.splits), ("COLUMNS", config.columns))
    for kind in _BYTES:
        pointers = (("length", "*i64"), ("sinks", "*fp32"), ("factor", "fp32"), ("out", f"*{kind}"))
        yield Case("merge_splits", kind, constants, pointers, config.num_warps, 3, Claims(wide_loads=1), Work())
