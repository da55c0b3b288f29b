"""Keys, names and transforms that several families share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch

from hybrimoe_kt.errors import ModelError

from .base import Composed, Key, Transform

__all__ = [
    "CHANNELS",
    "CORRECTION",
    "DECODER_KEYS",
    "GQA_KEYS",
    "GQA_SKELETON",
    "MINUS_ONE",
    "OFFSET_NORMS",
    "ROW",
    "SIGMOID",
    "SKELETON",
    "SOFTMAX",
    "STATE_SPACE_TRANSFORMS",
    "fused_qkv",
    "only_gated_by",
    "partial_rotary",
    "scale",
    "stacked",
    "unpermuted",
    "windows",
    "without",
]

_T = TypeVar("_T")
SOFTMAX, SIGMOID = 1, 2  # values of the GGUF key expert_gating_func

DECODER_KEYS = {
    "hidden_size": "embedding_length",
    "num_attention_heads": "attention.head_count",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
}
GQA_KEYS = DECODER_KEYS | {"num_key_value_heads": "attention.head_count_kv", "num_experts": "expert_count"}

SKELETON: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "intermediate_size": 64,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
GQA_SKELETON = SKELETON | {"num_key_value_heads": 2}

CORRECTION = "blk.{layer}.exp_probs_b.bias"

CHANNELS = Transform(lambda tensor, key: tensor[:, None], lambda shape: (shape[0], 1, *shape[1:]))
"""A depthwise kernel, stored without its dimension of one."""
_FLAT = Transform(lambda tensor, key: tensor.reshape(-1), lambda shape: (torch.Size(shape).numel(),))
_DECAY = Transform(lambda tensor, key: torch.log(-tensor).reshape(-1), _FLAT.shape)
"""Stored as -exp(A_log)."""
STATE_SPACE_TRANSFORMS = {"A_log": _DECAY, "D": _FLAT, "norm.weight": _FLAT, "conv1d.weight": CHANNELS}
"""Of a state space's parameters, by how their names end."""

MINUS_ONE = Transform(lambda tensor, key: tensor - 1)
"""Norms are stored as the factor they multiply by; some modules keep its distance from one."""

OFFSET_NORMS = dict.fromkeys(
    (
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        "q_norm.weight",
        "k_norm.weight",
        "model.norm.weight",
    ),
    MINUS_ONE,
)

ROW = Transform(build=lambda tensor, key: tensor.view(1, -1), shape=lambda shape: (1, shape[-1]))
"""A matrix of one row, which some converters store as a vector."""


def without(keys: Mapping[str, _T], *names: str) -> dict[str, _T]:
    """Return the entries but those named."""
    return {ours: theirs for ours, theirs in keys.items() if ours not in names}


def scale(key: Key) -> float:
    """Factor on the routing weights; as in llama.cpp, an absent one and zero mean none."""
    return float(key("expert_weights_scale", 0.0) or 1.0)


def partial_rotary(key: Key) -> float:
    """Which share of a head's dimensions is rotated."""
    return float(key("rope.dimension_count", key("attention.key_length")) / key("attention.key_length"))


def windows(key: Key, *, full: int = 3) -> dict[str, Any]:
    """Which layers look back at a window; without a list of them all but this one of every four."""
    window, count = key("attention.sliding_window", 0) or 0, key("block_count")
    given = key("attention.sliding_window_pattern", [layer % 4 != full for layer in range(count)])
    if not isinstance(given, list) or len(given) < count:
        raise ModelError(f"attention.sliding_window_pattern {given} is not of {count} layers")
    kinds = ["sliding_attention" if window and is_windowed else "full_attention" for is_windowed in given[:count]]
    return {"sliding_window": window or None, "layer_types": kinds}


def only_gated_by(gguf: str, function: int, key: Key) -> None:
    """Refuse a file whose router scores experts by another function than every model of the family."""
    names = {SOFTMAX: "softmax", SIGMOID: "sigmoid"}
    if (found := key("expert_gating_func", function)) != function:
        other = names.get(found, f"expert_gating_func {found}")
        raise ModelError(
            f"{gguf} with {other} routing is not supported; every released model routes by {names[function]}"
        )


def fused_qkv() -> dict[str, Composed]:
    """Queries, keys and values of files that have the three as rows of one tensor."""

    def rows(key: Key, place: int) -> slice:
        heads = [key(f"attention.head_count{ending}") for ending in ("", "_kv", "_kv")]
        widths = [
            count * key(f"attention.{kind}_length", key("attention.key_length"))
            for count, kind in zip(heads, ("key", "key", "value"), strict=True)
        ]
        return slice(sum(widths[:place]), sum(widths[: place + 1]))

    def composed(place: int) -> Composed:
        def shape(qkv: tuple[int, ...], key: Key) -> tuple[int, ...]:
            own = rows(key, place)
            return (max(0, min(own.stop, qkv[0]) - own.start), *qkv[1:])

        return Composed(("blk.{layer}.attn_qkv.weight",), lambda qkv, key: qkv[rows(key, place)], shape, moves="rows")

    return {f"self_attn.{name}_proj.weight": composed(place) for place, name in enumerate("qkv")}


def stacked(first: str, second: str) -> Composed:
    """Two matrices of a layer, the rows of the second below those of the first."""
    return Composed(
        (f"blk.{{layer}}.{first}.weight", f"blk.{{layer}}.{second}.weight"),
        lambda above, below, key: torch.cat((above, below)),
        lambda above, below, key: (above[0] + below[0], *above[1:]),
        moves="rows",
    )


def unpermuted(heads: str) -> Transform:
    """Undo the converter's pairing of rotary dimensions; `heads` is the GGUF key of the head count.

    Some files hold the rows of a head as x0, x64, x1, x65, ... for llama.cpp's rotation of neighbours;
    Transformers rotates the halves x0, x1, ... and x64, x65, ...
    """

    def build(tensor: torch.Tensor, key: Key) -> torch.Tensor:
        return tensor.view(key(heads), -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)

    return Transform(build, moves="rows")
