"""DeepSeek-V2, V3, R1, Kimi-K2 and GLM-4.7-Flash, which share the GGUF architecture deepseek2; GLM-4.5, Solar Open."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from hybrimoe_kt.errors import ModelError
from hybrimoe_kt.weights.gguf_file import GgufFile

from .base import Architecture, Composed, Key, LayerKind
from .common import CORRECTION, DECODER_KEYS, GQA_SKELETON, SIGMOID, SKELETON, SOFTMAX, only_gated_by, scale
from .softmax_router import choose_by_softmax

__all__ = ["FAMILIES", "KV_B", "LATENT_SKELETON", "even_out_norms"]

_BIAS = "mlp.gate.e_score_correction_bias"
_SHARED_EXPERT_KEYS = {
    "n_routed_experts": "expert_count",
    "intermediate_size": "feed_forward_length",
    "first_k_dense_replace": "leading_dense_block_count",
}
LATENT_SKELETON = SKELETON | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_shared_experts": 1,
    "n_routed_experts": 4,
}


def _glm4moe(key: Key) -> Mapping[str, Any]:
    only_gated_by("glm4moe", SIGMOID, key)
    return {
        "partial_rotary_factor": key("rope.dimension_count", key("attention.key_length")) / key("attention.key_length"),
        "routed_scaling_factor": scale(key),
        "norm_topk_prob": key("expert_weights_norm", False),
    }


def _deepseek2(key: Key) -> Mapping[str, Any]:
    if key("expert_gating_func", SOFTMAX) != SOFTMAX:
        raise ModelError(f"deepseek2 with expert_gating_func {key('expert_gating_func')} is not supported; 1 and 2 are")
    method = "group_limited_greedy" if key("expert_group_count", 1) > 1 else "greedy"
    return _latent(key) | {"topk_method": method}


def _deepseek3(key: Key) -> Mapping[str, Any]:
    return _latent(key) | {"norm_topk_prob": key("expert_weights_norm", False), "rope_interleave": True}


def _sparse(key: Key) -> Mapping[str, Any]:
    only_gated_by("sparse attention", SIGMOID, key)
    found = _deepseek3(key)
    layers = key("attention.indexer.types", None)
    if isinstance(layers, list):
        kinds = ["full" if is_full else "shared" for is_full in layers[: key("block_count")]]
        return dict(found) | {"indexer_types": kinds}
    return found


def _latent(key: Key) -> dict[str, Any]:
    """Dimensions of latent attention, and the groups of experts."""
    rope_dim = key("rope.dimension_count")
    query_dim = key("attention.key_length_mla") or key("attention.key_length")
    return {
        "qk_rope_head_dim": rope_dim,
        "qk_nope_head_dim": query_dim - rope_dim,
        "v_head_dim": key("attention.value_length_mla") or key("attention.value_length"),
        "q_lora_rank": key("attention.q_lora_rank"),
        "num_key_value_heads": key("attention.head_count"),
        "n_group": key("expert_group_count", 1),
        "topk_group": key("expert_group_used_count", 1),
        "routed_scaling_factor": scale(key),
    }


def even_out_norms(model: nn.Module) -> None:
    """Give the norms within latent attention the file's epsilon; Transformers has a fixed one there."""
    for module in model.modules():
        if hasattr(module, "kv_b_proj"):
            for name in ("q_a_layernorm", "kv_a_layernorm"):
                norm: Any = getattr(module, name, None)
                if norm is not None:
                    config: Any = module.config
                    norm.variance_epsilon = config.rms_norm_eps


def _with_softmax(model: nn.Module) -> None:
    even_out_norms(model)
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):
            module.forward = partial(choose_by_softmax, module)


def _dense_first(values: Mapping[str, Any]) -> dict[str, Any]:
    """GLM-4.7-Flash names each layer's kind; all its dense ones come first."""
    kinds: list[str] = values.get("mlp_layer_types") or ["dense"]
    given = values.get("first_k_dense_replace", kinds.count("dense"))
    if "sparse" in kinds and kinds != ["dense"] * given + ["sparse"] * (len(kinds) - given):
        raise ValueError(f"mlp_layer_types {kinds} has dense layers behind sparse ones")
    return dict(values) | ({"first_k_dense_replace": given} if values["model_type"] == "glm4_moe_lite" else {})


def _solar_open(values: Mapping[str, Any]) -> dict[str, Any]:
    """GLM-4.5 without dense layers and without norms of queries and keys."""
    whole = {"partial_rotary_factor": 1.0} if "partial_rotary_factor" not in values else {}
    return dict(values) | {"use_qk_norm": False, "first_k_dense_replace": 0} | whole


def _kv_b(k_b: torch.Tensor, v_b: torch.Tensor, key: Key) -> torch.Tensor:
    """`attn_k_b [heads, rank, nope]` and `attn_v_b [heads, v, rank]` -> `[heads * (nope + v), rank]`."""
    return torch.cat((k_b.transpose(1, 2), v_b), dim=1).flatten(0, 1)


def _kv_b_shape(k_b: tuple[int, ...], v_b: tuple[int, ...], key: Key) -> tuple[int, ...]:
    return (math.prod((k_b[0], k_b[2] + v_b[1])), k_b[1])


KV_B = {
    "self_attn.kv_b_proj.weight": Composed(
        ("blk.{layer}.attn_k_b.weight", "blk.{layer}.attn_v_b.weight"), _kv_b, _kv_b_shape
    )
}
"""Up-projections of latent attention, which newer files have apart."""

_DEEPSEEK2 = Architecture(
    gguf="deepseek2",
    answer_format="deepseek",
    model_type="deepseek_v2",
    layers={"DeepseekV2DecoderLayer": LayerKind(is_paired=True)},
    shared_experts={"DeepseekV2Moe": "shared_experts"},
    pre_tokenizers=("deepseek-llm",),
    skeleton=LATENT_SKELETON | {"num_hidden_layers": 27, "first_k_dense_replace": 1, "q_lora_rank": None},  # V2-Lite
    keys=DECODER_KEYS | _SHARED_EXPERT_KEYS | {"kv_lora_rank": "attention.kv_lora_rank"},
    optional_keys={"n_shared_experts": "expert_shared_count"},
    derive=_deepseek2,
    finish=even_out_norms,
    composed=KV_B,
)
_DEEPSEEK3 = replace(
    _DEEPSEEK2,
    alias="deepseek3",
    model_type="deepseek_v3",
    layers={"DeepseekV3DecoderLayer": LayerKind(is_paired=True)},
    shared_experts={"DeepseekV3MoE": "shared_experts"},
    pre_tokenizers=("deepseek-v3", "kimi-k2"),
    other_types=("kimi_k2", "glm4_moe_lite"),
    published_config=lambda config: {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    restated=_dense_first,
    skeleton=LATENT_SKELETON
    | {"num_hidden_layers": 61, "first_k_dense_replace": 3, "q_lora_rank": 16, "n_group": 2, "topk_group": 1},
    rules="deepseek2",
    derive=_deepseek3,
    names={_BIAS: CORRECTION},
    zero=(_BIAS,),
    float32=(_BIAS,),
)

_CORRECTED_SOFTMAX = replace(_DEEPSEEK3, finish=_with_softmax)
"""DeepSeek-V3's choice by the softmax of DeepSeek-V2, as llama.cpp reads a file of the one without its function."""


def _routing(file: GgufFile, key: Key) -> str:
    """Which entry routes as the file says."""
    if key("expert_gating_func", SOFTMAX) == SIGMOID:
        return "sigmoid"
    corrected = key("expert_weights_norm", False) or any(name.endswith(".exp_probs_b.bias") for name in file.tensors)
    return "corrected softmax" if key("expert_gating_func", SOFTMAX) == SOFTMAX and corrected else "softmax"


_INDEXER = "self_attn.indexer."
_SPARSE = replace(
    _DEEPSEEK3,
    gguf="deepseek32",
    alias="",
    model_type="deepseek_v32",
    answer_format="dsml",
    other_types=(),
    restated=dict,
    layers={},
    shared_experts={"DeepseekV32MoE": "shared_experts"},
    rules="",
    tensor_table="deepseek2",
    pre_tokenizers=("deepseek-v3",),
    skeleton=LATENT_SKELETON
    | {"num_hidden_layers": 61, "first_k_dense_replace": 3, "q_lora_rank": 16, "n_group": 2, "topk_group": 1}
    | {"index_topk": 16, "index_head_dim": 16, "index_n_heads": 2},
    keys={
        **_DEEPSEEK3.keys,
        "index_n_heads": "attention.indexer.head_count",
        "index_head_dim": "attention.indexer.key_length",
        "index_topk": "attention.indexer.top_k",
    },
    derive=_sparse,
    names={
        _BIAS: CORRECTION,
        _INDEXER + "wq_b.weight": "blk.{layer}.indexer.attn_q_b.weight",
        _INDEXER + "wk.weight": "blk.{layer}.indexer.attn_k.weight",
        _INDEXER + "k_norm.weight": "blk.{layer}.indexer.k_norm.weight",
        _INDEXER + "k_norm.bias": "blk.{layer}.indexer.k_norm.bias",
        _INDEXER + "weights_proj.weight": "blk.{layer}.indexer.proj.weight",
    },
    zero=(),
    float32=(_BIAS, "mlp.gate.weight", _INDEXER + "weights_proj.weight"),
)
"""Each query sees the tokens that an indexer finds, as Transformers has it."""

FAMILIES = (
    _SPARSE,
    replace(
        _SPARSE,
        gguf="glm-dsa",
        model_type="glm_moe_dsa",
        answer_format="glm",
        rules="deepseek32",
        tensor_table="",
        shared_experts={"GlmMoeDsaMoE": "shared_experts"},
        pre_tokenizers=("glm4",),
        skeleton={**_SPARSE.skeleton, "num_hidden_layers": 78},
    ),
    replace(_DEEPSEEK2, variant=_routing, variants={"sigmoid": _DEEPSEEK3, "corrected softmax": _CORRECTED_SOFTMAX}),
    Architecture(
        gguf="glm4moe",
        model_type="glm4_moe",
        answer_format="glm",
        other_types=("solar_open",),
        restated=_solar_open,
        layers={"Glm4MoeDecoderLayer": LayerKind()},
        shared_experts={"Glm4MoeMoE": "shared_experts"},
        pre_tokenizers=("glm4",),
        skeleton=GQA_SKELETON | {"num_hidden_layers": 46, "n_routed_experts": 4, "first_k_dense_replace": 1},  # Air
        keys=DECODER_KEYS
        | _SHARED_EXPERT_KEYS
        | {"num_key_value_heads": "attention.head_count_kv", "head_dim": "attention.key_length"},
        optional_keys={"n_shared_experts": "expert_shared_count"},
        present={"attention_bias": "blk.0.attn_q.bias", "use_qk_norm": "blk.0.attn_q_norm.weight"},
        constants={"n_group": 1, "topk_group": 1},  # llama.cpp knows no groups in this family, nor has any model
        derive=_glm4moe,
        names={_BIAS: CORRECTION},
        float32=(_BIAS,),
    ),
)
