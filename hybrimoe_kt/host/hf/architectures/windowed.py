"""Families some of whose layers look back at a window only: K-EXAONE, Mellum 2, Trinity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrimoe_kt.errors import ModelError

from .base import Architecture, Key, LayerKind
from .common import CORRECTION, GQA_KEYS, GQA_SKELETON, SIGMOID, SOFTMAX, only_gated_by, scale, windows

__all__ = ["FAMILIES"]

_GATE_BIAS = "mlp.gate.e_score_correction_bias"
_KEYS = GQA_KEYS | {"intermediate_size": "feed_forward_length", "head_dim": "attention.key_length"}
_SKELETON = GQA_SKELETON | {"num_experts": 4, "head_dim": 16}


def _exaone(key: Key) -> Mapping[str, Any]:
    only_gated_by("exaone-moe", SIGMOID, key)
    return windows(key, 4) | {
        "n_group": key("expert_group_count", 1),
        "topk_group": key("expert_group_used_count", 1),
        "norm_topk_prob": key("expert_weights_norm", False),
        "routed_scaling_factor": scale(key),
    }


def _afmoe(key: Key) -> Mapping[str, Any]:
    only_gated_by("afmoe", SIGMOID, key)
    if not key("expert_weights_norm", True):
        raise ModelError("afmoe without normalised routing weights is not supported; every released model has them so")
    return windows(key, 4) | {"route_scale": scale(key)}


def _mellum(key: Key) -> Mapping[str, Any]:
    only_gated_by("mellum", SOFTMAX, key)
    return windows(key, 4)


FAMILIES = (
    Architecture(
        gguf="exaone-moe",
        model_type="exaone_moe",
        answer_format="hermes",
        layers={"ExaoneMoeDecoderLayer": LayerKind(turns_in_windows_only=True)},
        shared_experts={"ExaoneMoeSparseMoEBlock": "shared_experts"},
        rules="glm4moe",
        pre_tokenizers=("exaone-moe",),
        skeleton=_SKELETON | {"num_hidden_layers": 48, "num_shared_experts": 1, "first_k_dense_replace": 1},
        keys=_KEYS | {"first_k_dense_replace": "leading_dense_block_count"},
        optional_keys={"num_shared_experts": "expert_shared_count"},
        derive=_exaone,
        names={_GATE_BIAS: CORRECTION},
        float32=(_GATE_BIAS, "mlp.gate.weight"),
    ),
    Architecture(
        gguf="afmoe",
        model_type="afmoe",
        shared_experts={},  # added in front of the routed ones
        pre_tokenizers=("afmoe",),
        skeleton=_SKELETON | {"num_hidden_layers": 32, "num_shared_experts": 1, "num_dense_layers": 1},
        keys=_KEYS | {"num_dense_layers": "leading_dense_block_count"},
        optional_keys={"num_shared_experts": "expert_shared_count"},
        constants={"mup_enabled": True},  # in every file: llama.cpp scales what it looks up
        derive=_afmoe,
        names={
            "mlp.expert_bias": CORRECTION,
            "mlp.router.gate.weight": "blk.{layer}.ffn_gate_inp.weight",
            "self_attn.gate_proj.weight": "blk.{layer}.attn_gate.weight",
            "post_attention_layernorm.weight": "blk.{layer}.post_attention_norm.weight",
            "pre_mlp_layernorm.weight": "blk.{layer}.ffn_norm.weight",
            "post_mlp_layernorm.weight": "blk.{layer}.post_ffw_norm.weight",
        },
        float32=("mlp.expert_bias",),
        router_inputs=("expert_bias",),
        routes_texts=True,
        expert_norm="pre_mlp_layernorm",
    ),
    Architecture(
        gguf="mellum",
        model_type="mellum",
        layers={"MellumDecoderLayer": LayerKind()},
        rules="qwen3moe",
        pre_tokenizers=("mellum2",),
        skeleton=_SKELETON | {"num_hidden_layers": 28},
        tensor_table="qwen3moe",
        keys=_KEYS,
        constants={"norm_topk_prob": True},
        derive=_mellum,
        has_rotary_kinds=True,
    ),
)
