"""Qwen2-MoE, Qwen3-MoE, and the hybrids Qwen3-Next and Qwen3.5-MoE with their gated linear attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from hybrimoe_kt.errors import ModelError

from .base import ONE_EACH, STACKED, Architecture, Composed, Key, LayerKind, Transform
from .common import CHANNELS, GQA_KEYS, GQA_SKELETON, OFFSET_NORMS, ROW

__all__ = ["FAMILIES", "HYBRID_KEYS", "HYBRID_NAMES", "HYBRID_SKELETON", "LINEAR_TRANSFORMS", "hybrid"]

_SPLIT = ("qwen2",)
_SKELETON = GQA_SKELETON | {"num_experts": 4}
HYBRID_SKELETON = _SKELETON | {
    "shared_expert_intermediate_size": 32,
    "head_dim": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}


def _normalised(values: Mapping[str, Any]) -> dict[str, Any]:
    """Qwen3-VL always normalises routing weights, and one that turns positions by three axes turns text by one."""
    rotary = {key: value for key, value in (values.get("rope_parameters") or {}).items() if "mrope" not in key}
    return dict(values) | {"norm_topk_prob": True} | ({"rope_parameters": rotary} if rotary else {})


def _only_text(key: Key) -> Mapping[str, Any]:
    key("n_deepstack_layers")  # which layers are told what is seen
    return {}


_KEY_HEADS, _VALUE_HEADS, _KEY_DIM = "ssm.group_count", "ssm.time_step_rank", "ssm.state_size"

HYBRID_KEYS = GQA_KEYS | {
    "head_dim": "attention.key_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "linear_conv_kernel_dim": "ssm.conv_kernel",
    "linear_key_head_dim": _KEY_DIM,
    "linear_num_key_heads": _KEY_HEADS,
    "linear_num_value_heads": _VALUE_HEADS,
}


def hybrid(key: Key) -> Mapping[str, Any]:
    interval, num_layers = key("full_attention_interval", 4), key("block_count")
    recurrent = key("attention.recurrent_layers") or [(layer + 1) % interval != 0 for layer in range(num_layers)]
    if len(recurrent) < num_layers or all(recurrent[:num_layers]):
        raise ModelError(f"attention.recurrent_layers of {len(recurrent)} layers leaves none of {num_layers} full")
    return {
        "linear_value_head_dim": key("ssm.inner_size") // key(_VALUE_HEADS),
        "layer_types": [
            "linear_attention" if is_recurrent else "full_attention" for is_recurrent in recurrent[:num_layers]
        ],
        "partial_rotary_factor": key("rope.dimension_count", key("attention.key_length")) / key("attention.key_length"),
    }


_HYBRID_TRANSFORMS = OFFSET_NORMS | {"mlp.shared_expert_gate.weight": ROW}


def _qkvz(qkv: torch.Tensor, gate: torch.Tensor, key: Key) -> torch.Tensor:
    """Rows of all queries, keys and values, and the gate's -> the same by key head, as Transformers has them."""
    heads, width = key(_KEY_HEADS), key(_KEY_DIM) * key(_KEY_HEADS)
    parts = (*qkv.split((width, width, qkv.shape[0] - 2 * width)), gate)
    return torch.cat([part.view(heads, -1, part.shape[1]) for part in parts], dim=1).flatten(0, 1)


def _grouped(head_dim: Callable[[Key], int], dim: int = 0, after: Callable[[Key], int] = lambda key: 0) -> Transform:
    """Sort value heads by key head again: the file has the first of every key head, then the second of each, ...

    `head_dim` entries along `dim` belong to one head; entries before `after` are not value heads.
    """

    def build(tensor: torch.Tensor, key: Key) -> torch.Tensor:
        key_heads, start = key(_KEY_HEADS), after(key)
        fixed, tiled = tensor.split((start, tensor.shape[dim] - start), dim)
        shape = (*tiled.shape[:dim], -1, key_heads, head_dim(key), *tiled.shape[dim + 1 :])
        return torch.cat((fixed, tiled.reshape(shape).transpose(dim, dim + 1).reshape(tiled.shape)), dim)

    return Transform(build, moves="columns" if dim else "rows")


def _value_dim(key: Key) -> int:
    return int(key("ssm.inner_size")) // int(key(_VALUE_HEADS))


def _after_keys(key: Key) -> int:
    return 2 * int(key(_KEY_DIM)) * int(key(_KEY_HEADS))


def _one(key: Key) -> int:
    return 1


def _then(first: Transform, second: Transform) -> Transform:
    return Transform(
        lambda tensor, key: second.build(first.build(tensor, key), key),
        lambda shape: second.shape(first.shape(shape)),
    )


_LOG = Transform(lambda tensor, key: torch.log(-tensor))
"""The decay is stored as -exp(A_log)."""

_LINEAR = "linear_attn."
HYBRID_NAMES = {_LINEAR + "A_log": "blk.{layer}.ssm_a", _LINEAR + "dt_bias": "blk.{layer}.ssm_dt.bias"}

LINEAR_TRANSFORMS = {
    _LINEAR + "A_log": _then(_LOG, _grouped(_one)),
    _LINEAR + "dt_bias": _grouped(_one),
    _LINEAR + "conv1d.weight": _then(CHANNELS, _grouped(_value_dim, after=_after_keys)),
    _LINEAR + "in_proj_qkv.weight": _grouped(_value_dim, after=_after_keys),
    _LINEAR + "in_proj_z.weight": _grouped(_value_dim),
    _LINEAR + "in_proj_a.weight": _grouped(_one),
    _LINEAR + "in_proj_b.weight": _grouped(_one),
    _LINEAR + "out_proj.weight": _grouped(_value_dim, dim=1),
}
"""Of linear attention since Qwen3.5, whose value heads stand in another order in a file."""

_QWEN3 = Architecture(  # and of Qwen3-VL the part that writes, which is the same for text alone
    gguf="qwen3moe",
    model_type="qwen3_moe",
    answer_format="hermes",
    other_types=("qwen3_vl_moe_text",),
    restated=_normalised,
    layers={"Qwen3MoeDecoderLayer": LayerKind()},
    skeleton=_SKELETON | {"num_hidden_layers": 48, "head_dim": 16},
    checkpoint_names=(ONE_EACH, replace(STACKED, may_be_transposed=True)),
    pre_tokenizers=_SPLIT,
    keys=GQA_KEYS | {"head_dim": "attention.key_length"},
    optional_keys={"intermediate_size": "feed_forward_length"},
    # The GGUF format has no flag for it: llama.cpp always renormalises for this family, as its models do.
    constants={"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
)

FAMILIES = (
    _QWEN3,
    replace(_QWEN3, gguf="qwen3vlmoe", rules="qwen3moe", derive=_only_text),
    Architecture(
        gguf="qwen2moe",
        model_type="qwen2_moe",
        answer_format="hermes",
        layers={"Qwen2MoeDecoderLayer": LayerKind()},
        shared_experts={"Qwen2MoeSparseMoeBlock": "shared_expert"},
        skeleton=_SKELETON | {"num_hidden_layers": 28, "shared_expert_intermediate_size": 32},
        pre_tokenizers=_SPLIT,
        keys=GQA_KEYS | {"shared_expert_intermediate_size": "expert_shared_feed_forward_length"},
        optional_keys={"intermediate_size": "feed_forward_length"},
        # As in llama.cpp and in the released models: routing weights keep their softmax values.
        constants={"norm_topk_prob": False, "qkv_bias": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
        transforms={"mlp.shared_expert_gate.weight": ROW},
    ),
    Architecture(
        gguf="qwen3next",
        model_type="qwen3_next",
        answer_format="hermes",
        layers={"Qwen3NextDecoderLayer": LayerKind(is_gated=True)},
        shared_experts={"Qwen3NextSparseMoeBlock": "shared_expert"},
        skeleton=HYBRID_SKELETON | {"num_hidden_layers": 48},
        pre_tokenizers=_SPLIT,
        keys=HYBRID_KEYS,
        optional_keys={"intermediate_size": "feed_forward_length"},
        constants={"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
        derive=hybrid,
        names=HYBRID_NAMES,
        composed={
            _LINEAR + "in_proj_qkvz.weight": Composed(
                ("blk.{layer}.attn_qkv.weight", "blk.{layer}.attn_gate.weight"),
                _qkvz,
                lambda qkv, gate, key: (qkv[0] + gate[0], qkv[1]),
                moves="rows",
            )
        },
        transforms=_HYBRID_TRANSFORMS | {_LINEAR + "A_log": _LOG, _LINEAR + "conv1d.weight": CHANNELS},
        norm_offset=1.0,
    ),
    Architecture(
        gguf="qwen35moe",
        model_type="qwen3_5_moe_text",
        answer_format="qwen-xml",
        layers={"Qwen3_5MoeDecoderLayer": LayerKind(is_gated=True)},
        shared_experts={"Qwen3_5MoeSparseMoeBlock": "shared_expert"},
        skeleton=HYBRID_SKELETON | {"num_hidden_layers": 40},
        pre_tokenizers=("qwen35",),
        keys=HYBRID_KEYS,
        derive=hybrid,
        names=HYBRID_NAMES,
        transforms=_HYBRID_TRANSFORMS | LINEAR_TRANSFORMS,
        norm_offset=1.0,
    ),
)
