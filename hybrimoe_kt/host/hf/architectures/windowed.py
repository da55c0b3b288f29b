"""Families some of whose layers look back at a window only: K-EXAONE, Mellum 2, Trinity, Laguna, MiMo-V2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hybrimoe_kt.errors import ModelError
from hybrimoe_kt.weights.expert_layers import num_layers
from hybrimoe_kt.weights.gguf_file import GgufFile

from .base import Architecture, Key, LayerKind
from .common import CORRECTION, GQA_KEYS, GQA_SKELETON, SIGMOID, SOFTMAX, only_gated_by, scale, windows, without

__all__ = ["FAMILIES"]

_GATE_BIAS = "mlp.gate.e_score_correction_bias"
_KEYS = GQA_KEYS | {"intermediate_size": "feed_forward_length", "head_dim": "attention.key_length"}
_SKELETON = GQA_SKELETON | {"num_experts": 4, "head_dim": 16}


def _exaone(key: Key) -> Mapping[str, Any]:
    only_gated_by("exaone-moe", SIGMOID, key)
    return windows(key) | {
        "n_group": key("expert_group_count", 1),
        "topk_group": key("expert_group_used_count", 1),
        "norm_topk_prob": key("expert_weights_norm", False),
        "routed_scaling_factor": scale(key),
    }


def _afmoe(key: Key) -> Mapping[str, Any]:
    only_gated_by("afmoe", SIGMOID, key)
    if not key("expert_weights_norm", True):
        raise ModelError("afmoe without normalised routing weights is not supported; every released model has them so")
    return windows(key) | {"route_scale": scale(key)}


def _mimo_as_published(config: Any) -> Mapping[str, Any]:
    in_windows, everywhere = (config.rope_parameters[kind] for kind in ("sliding_attention", "full_attention"))
    return {
        "hybrid_layer_pattern": [int(kind == "sliding_attention") for kind in config.layer_types],
        "moe_layer_freq": [int(kind == "sparse") for kind in config.mlp_layer_types],
        "sliding_window_size": config.sliding_window,
        "layernorm_epsilon": config.rms_norm_eps,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "rope_theta": everywhere["rope_theta"],
        "swa_rope_theta": in_windows["rope_theta"],
        "partial_rotary_factor": everywhere.get("partial_rotary_factor", 1.0),
        "swa_num_attention_heads": config.num_attention_heads,
        "swa_head_dim": config.head_dim,
        "swa_v_head_dim": config.v_head_dim,
    }


def _laguna(key: Key) -> Mapping[str, Any]:
    only_gated_by("laguna", SIGMOID, key)
    if not key("expert_weights_norm", True):
        raise ModelError("laguna without normalised routing weights is not supported; every released model has them so")
    count, dense, width = key("block_count"), key("leading_dense_block_count", 1), key("attention.key_length")
    heads = key("attention.head_count", of_each_layer=True)[:count]
    rotated = {"full_attention": key("rope.dimension_count", width)}
    rotated |= {"sliding_attention": key("rope.dimension_count_swa", rotated["full_attention"])}
    return windows(key, full=0) | {
        "num_attention_heads": max(heads),
        "num_attention_heads_per_layer": heads,
        "mlp_layer_types": ["dense"] * dense + ["sparse"] * (count - dense),
        "moe_routed_scaling_factor": scale(key),
        "rope_parameters": {kind: {"partial_rotary_factor": dims / width} for kind, dims in rotated.items()},
    }


def _gates(file: GgufFile, key: Key) -> str | None:
    """Whether attention's gates are of each head, or of each of its values."""
    heads = key("attention.head_count", of_each_layer=True)
    return None if file.tensor("blk.0.attn_gate.weight").shape[0] == heads[0] else "per-element"


def _mellum(key: Key) -> Mapping[str, Any]:
    only_gated_by("mellum", SOFTMAX, key)
    return windows(key)


def _mimo(key: Key) -> Mapping[str, Any]:
    only_gated_by("mimo2", SIGMOID, key)
    found, width = windows(key), key("attention.key_length")
    kinds, heads = found["layer_types"], key("attention.head_count_kv", of_each_layer=True)[: key("block_count")]
    whole = next((count for count, kind in zip(heads, kinds, strict=True) if kind == "full_attention"), heads[0] // 2)
    if heads != [whole * (2 if kind == "sliding_attention" else 1) for kind in kinds]:
        raise ModelError(f"mimo2 has twice as many heads of keys in layers with windows, this file has {heads}")
    if key("rope.scaling.attn_factor", 1.0) != 1.0:
        raise ModelError("mimo2 with an attention factor is not supported; no released model has one")
    dims = key("rope.dimension_count", width)
    rotated = {"partial_rotary_factor": (dims + 0.5) / width}  # Transformers cuts what it multiplies by it
    return found | {
        "num_key_value_heads": whole,
        "v_head_dim": key("attention.value_length", width),
        "attention_value_scale": key("attention.value_scale", 1.0),
        "norm_topk_prob": True,
        "n_group": 1,
        "topk_group": 1,
        "rope_parameters": {kind: dict(rotated) for kind in set(kinds)},
    }


def _kinds_of_mlp(file: GgufFile) -> list[str]:
    routers = (f"blk.{layer}.ffn_gate_inp.weight" in file.tensors for layer in range(num_layers(file)))
    return ["sparse" if is_routed else "dense" for is_routed in routers]


_LAGUNA = Architecture(
    gguf="laguna",
    model_type="laguna",
    rules="afmoe",
    pre_tokenizers=("laguna",),
    skeleton=_SKELETON | {"num_hidden_layers": 40, "shared_expert_intermediate_size": 32},
    tensor_table="dots1",
    keys=without(_KEYS, "num_attention_heads")
    | {"shared_expert_intermediate_size": "expert_shared_feed_forward_length"},
    constants={"gating": True},
    derive=_laguna,
    names={_GATE_BIAS: CORRECTION, "self_attn.g_proj.weight": "blk.{layer}.attn_gate.weight"},
    float32=(_GATE_BIAS,),
    has_rotary_kinds=True,
)

FAMILIES = (
    replace(
        _LAGUNA,
        variant=_gates,
        variants={"per-element": replace(_LAGUNA, alias="laguna-m", constants={"gating": "per-element"})},
    ),
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
        gguf="mimo2",
        model_type="mimo_v2_flash",
        published_config=_mimo_as_published,
        answer_format="hermes",
        rules="afmoe",
        pre_tokenizers=("qwen2",),
        skeleton=without(_SKELETON, "num_experts") | {"num_hidden_layers": 48, "n_routed_experts": 4, "v_head_dim": 8},
        keys=without(_KEYS, "num_key_value_heads", "num_experts")
        | {"n_routed_experts": "expert_count", "sliding_window": "attention.sliding_window"},
        told_by_tensors={"mlp_layer_types": _kinds_of_mlp},
        derive=_mimo,
        names={_GATE_BIAS: CORRECTION, "self_attn.sinks": "blk.{layer}.attn_sinks.weight"},
        float32=(_GATE_BIAS, "mlp.gate.weight"),
        has_rotary_kinds=True,
    ),
    Architecture(
        gguf="afmoe",
        model_type="afmoe",
        published_config=lambda config: {"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1},
        answer_format="hermes",
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
