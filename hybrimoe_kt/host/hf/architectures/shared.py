"""Families with grouped-query attention and shared experts: dots1, Hunyuan, Ling 2 and Sarvam, Hy3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrimoe_kt.errors import ModelError

from .base import Architecture, Key, LayerKind
from .common import (
    CORRECTION,
    DECODER_KEYS,
    GQA_KEYS,
    GQA_SKELETON,
    SIGMOID,
    SOFTMAX,
    fused_qkv,
    only_gated_by,
    partial_rotary,
    scale,
    without,
)

__all__ = ["FAMILIES"]

_GROUPS = {"n_group": "expert_group_count", "topk_group": "expert_group_used_count"}
_DENSE_FIRST = {"intermediate_size": "feed_forward_length", "first_k_dense_replace": "leading_dense_block_count"}
_ROUTED_KEYS = (
    DECODER_KEYS | _DENSE_FIRST | {"num_key_value_heads": "attention.head_count_kv", "n_routed_experts": "expert_count"}
)
_ROUTED_SKELETON = GQA_SKELETON | {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
_GATE_BIAS, _BLOCK_BIAS = "mlp.gate.e_score_correction_bias", "mlp.e_score_correction_bias"


def _dots1(key: Key) -> Mapping[str, Any]:
    only_gated_by("dots1", SIGMOID, key)
    return {"norm_topk_prob": key("expert_weights_norm", False), "routed_scaling_factor": scale(key)}


def _bailing(key: Key) -> Mapping[str, Any]:
    only_gated_by("bailingmoe2", SIGMOID, key)
    return {
        "partial_rotary_factor": partial_rotary(key),
        "norm_topk_prob": key("expert_weights_norm", False),
        "routed_scaling_factor": scale(key),
    }


def _not_first(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Refuse Ling 1's config.json, which has the same type and describes another model."""
    if "BailingMoeForCausalLM" in (values.get("architectures") or ()):
        raise ValueError("Ling 1 runs from a GGUF file, whose metadata says all that is needed")
    return values


def _hunyuan(key: Key) -> Mapping[str, Any]:
    only_gated_by("hunyuan-moe", SOFTMAX, key)
    wide, shared = key("expert_feed_forward_length"), key("expert_shared_feed_forward_length")
    if wide != shared:
        raise ValueError(f"its experts are {wide} wide and its shared one {shared}; the model has one width")
    return {}


def _one_for_all(values: Mapping[str, Any]) -> dict[str, Any]:
    """Hunyuan's config.json has a number for each layer, always the same."""
    found = dict(values)
    for name in ("moe_topk", "moe_intermediate_size", "num_shared_expert"):
        each = values.get(name)
        if isinstance(each, list):
            if len(set(each)) != 1:
                raise ValueError(f"{name} differs from layer to layer ({each[:8]}), which is not supported")
            found[name] = each[0]
    return found


def _hy3(key: Key) -> Mapping[str, Any]:
    only_gated_by("hy_v3", SIGMOID, key)
    if not key("expert_weights_norm", True):
        raise ModelError("hy_v3 without normalised routing weights is not supported; every released model has them so")
    dense = key("leading_dense_block_count", 1)
    shared, width = key("expert_shared_feed_forward_length"), key("expert_feed_forward_length")
    return {
        "num_shared_experts": shared // width,
        "mlp_layer_types": ["dense"] * dense + ["sparse"] * (key("block_count") - dense),
        "router_scaling_factor": scale(key),
    }


FAMILIES = (
    Architecture(
        gguf="dots1",
        model_type="dots1",
        answer_format="hermes",
        layers={"Dots1DecoderLayer": LayerKind()},
        shared_experts={"Dots1MoE": "shared_experts"},
        rules="glm4moe",
        pre_tokenizers=("qwen2",),
        skeleton=_ROUTED_SKELETON | {"num_hidden_layers": 62},
        keys=_ROUTED_KEYS,
        optional_keys={"n_shared_experts": "expert_shared_count"},
        constants={"n_group": 1, "topk_group": 1, "sliding_window": None},
        derive=_dots1,
        names={_GATE_BIAS: CORRECTION},
        float32=(_GATE_BIAS,),
    ),
    Architecture(  # of Ling and Ring 2 Transformers has no model of their own: they are GLM-4.5 with groups
        gguf="bailingmoe2",
        model_type="sarvam_moe",
        answer_format="hermes",
        other_types=("bailing_moe", "bailing_moe_v2"),
        restated=_not_first,
        layers={"Glm4MoeDecoderLayer": LayerKind()},
        shared_experts={"Glm4MoeMoE": "shared_experts"},
        rules="glm4moe",
        pre_tokenizers=("bailingmoe2", "bailingmoe"),
        skeleton=_ROUTED_SKELETON | {"num_hidden_layers": 20, "head_dim": 16},
        keys=_ROUTED_KEYS | {"head_dim": "attention.key_length"},
        optional_keys={"n_shared_experts": "expert_shared_count"} | _GROUPS,
        constants={"use_qk_norm": True, "attention_bias": False},
        derive=_bailing,
        composed=fused_qkv(),
        names={_GATE_BIAS: CORRECTION},
        float32=(_GATE_BIAS,),
    ),
    Architecture(
        gguf="hunyuan-moe",
        model_type="hunyuan_v1_moe",
        answer_format="hunyuan",
        other_types=("hunyuan_v1_moe", "hunyuan"),
        restated=_one_for_all,
        shared_experts={"HunYuanMoEV1Moe": "shared_mlp"},
        pre_tokenizers=("hunyuan",),
        skeleton=without(GQA_SKELETON, "num_experts_per_tok", "moe_intermediate_size")
        | {"num_hidden_layers": 32, "num_experts": 4, "moe_topk": 2, "head_dim": 16},
        keys=without(GQA_KEYS, "num_experts_per_tok", "moe_intermediate_size")
        | {
            "intermediate_size": "expert_feed_forward_length",
            "moe_topk": "expert_used_count",
            "head_dim": "attention.key_length",
        },
        derive=_hunyuan,
        names={
            "mlp.gate.wg.weight": "blk.{layer}.ffn_gate_inp.weight",
            "self_attn.query_layernorm.weight": "blk.{layer}.attn_q_norm.weight",
            "self_attn.key_layernorm.weight": "blk.{layer}.attn_k_norm.weight",
            "mlp.shared_mlp.gate_proj.weight": "blk.{layer}.ffn_gate_shexp.weight",
            "mlp.shared_mlp.up_proj.weight": "blk.{layer}.ffn_up_shexp.weight",
            "mlp.shared_mlp.down_proj.weight": "blk.{layer}.ffn_down_shexp.weight",
        },
        float32=("mlp.gate.wg.weight",),
    ),
    Architecture(
        gguf="hy_v3",
        model_type="hy_v3",
        published_config=lambda config: {
            "first_k_dense_replace": config.mlp_layer_types.count("dense"),
            "expert_hidden_dim": config.moe_intermediate_size,
            "route_norm": True,
            "qk_norm": True,
        },
        answer_format="hunyuan-xml",
        layers={"HYV3DecoderLayer": LayerKind()},
        shared_experts={"HYV3MoE": "shared_experts"},
        rules="glm4moe",
        pre_tokenizers=("hunyuan-dense",),
        skeleton=GQA_SKELETON | {"num_hidden_layers": 80, "num_experts": 4, "head_dim": 16},
        tensor_table="glm4moe",
        keys=GQA_KEYS | {"intermediate_size": "feed_forward_length", "head_dim": "attention.key_length"},
        derive=_hy3,
        names={
            _BLOCK_BIAS: "blk.{layer}.exp_probs_b",
            "post_attention_layernorm.weight": "blk.{layer}.ffn_norm.weight",
        },
        float32=(_BLOCK_BIAS, "mlp.gate.weight"),
        router_inputs=("e_score_correction_bias",),
    ),
)
