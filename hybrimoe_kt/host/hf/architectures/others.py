"""Families with grouped-query attention and one kind of layer: Mixtral, OLMoE, Granite, Ling 1, MiniMax-M2, ERNIE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hybrimoe_kt.errors import ModelError
from hybrimoe_kt.weights.checkpoint import ExpertNames
from hybrimoe_kt.weights.gguf_file import GgufFile

from .base import STACKED, W1_W3_W2, Architecture, Key, LayerKind
from .common import (
    CORRECTION,
    DECODER_KEYS,
    GQA_KEYS,
    GQA_SKELETON,
    SIGMOID,
    SOFTMAX,
    only_gated_by,
    scale,
    stacked,
    unpermuted,
    without,
)

__all__ = ["FAMILIES", "GRANITE_SHARED"]

_PAIRED_ROTARY = {
    "self_attn.q_proj.weight": unpermuted("attention.head_count"),
    "self_attn.k_proj.weight": unpermuted("attention.head_count_kv"),
}
# Families whose experts take the width that others give to their dense layers.
_PLAIN_WIDTH = without(DECODER_KEYS, "moe_intermediate_size") | {
    "num_key_value_heads": "attention.head_count_kv",
    "num_local_experts": "expert_count",
}
_PLAIN_SKELETON = without(GQA_SKELETON, "moe_intermediate_size") | {"num_local_experts": 4}
_INPUT_OUTPUT = ExpertNames(
    "block_sparse_moe.input_linear.weight",
    "block_sparse_moe.input_linear.weight",
    "block_sparse_moe.output_linear.weight",
)
_MINIMAX_BIAS = "mlp.e_score_correction_bias"
_ERNIE_BIAS = "mlp.gate.moe_statics.e_score_correction_bias"


def _shared_width(file: GgufFile, key: Key) -> str | None:
    return "shared" if key("expert_shared_feed_forward_length", 0) else None


def _minimax(key: Key) -> Mapping[str, Any]:
    only_gated_by("minimax-m2", SIGMOID, key)
    return {
        "partial_rotary_factor": key("rope.dimension_count", key("attention.key_length")) / key("attention.key_length")
    }


def _ernie(key: Key) -> Mapping[str, Any]:
    only_gated_by("ernie4_5-moe", SOFTMAX, key)
    return {}


_GRANITE = Architecture(
    gguf="granitemoe",
    model_type="granitemoe",
    answer_format="granite",
    layers={"GraniteMoeDecoderLayer": LayerKind()},
    pre_tokenizers=("refact",),
    skeleton=_PLAIN_SKELETON | {"num_hidden_layers": 32},
    checkpoint_names=(_INPUT_OUTPUT,),
    keys=_PLAIN_WIDTH
    | {
        "intermediate_size": "feed_forward_length",
        "attention_multiplier": "attention.scale",
        "embedding_multiplier": "embedding_scale",
        "residual_multiplier": "residual_scale",
        "logits_scaling": "logit_scale",
    },
    names={"block_sparse_moe.router.weight": "blk.{layer}.ffn_gate_inp.weight"},
    transforms=_PAIRED_ROTARY,
)
GRANITE_SHARED = replace(
    _GRANITE,
    alias="granitemoeshared",
    model_type="granitemoeshared",
    rules="granitemoe",
    layers={"GraniteMoeSharedDecoderLayer": LayerKind()},
    skeleton={**_GRANITE.skeleton, "shared_intermediate_size": 32},
    keys={**_GRANITE.keys, "shared_intermediate_size": "expert_shared_feed_forward_length"},
    names={**_GRANITE.names, "shared_mlp.output_linear.weight": "blk.{layer}.ffn_down_shexp.weight"},
    composed={
        "shared_mlp.input_linear.weight": stacked("ffn_gate_shexp", "ffn_up_shexp"),
    },
)


def _ling(key: Key) -> Mapping[str, Any]:
    only_gated_by("bailingmoe", SOFTMAX, key)
    if not key("expert_weights_norm", False):
        raise ModelError(
            "bailingmoe without normalised routing weights is not supported; every released model has them"
        )
    if (factor := scale(key)) != 1.0:
        raise ModelError(f"bailingmoe with expert_weights_scale {factor:g} is not supported; no released model has one")
    width = key("attention.key_length")
    if key("rope.dimension_count", width) != width:
        raise ModelError("bailingmoe that rotates a part of its heads is not supported; no released model does")
    return {
        "attention_multiplier": width**-0.5,
        "shared_intermediate_size": key("expert_feed_forward_length") * key("expert_shared_count"),
    }


_LING = replace(  # Transformers has no model of Ling 1: it is Granite with shared experts, and no factors
    GRANITE_SHARED,
    gguf="bailingmoe",
    alias="",
    answer_format="",
    pre_tokenizers=("bailingmoe",),
    skeleton={**GRANITE_SHARED.skeleton, "num_hidden_layers": 28, "head_dim": 16},
    keys=_PLAIN_WIDTH | {"intermediate_size": "expert_feed_forward_length", "head_dim": "attention.key_length"},
    constants={"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0},
    derive=_ling,
)

FAMILIES = (
    Architecture(  # with experts: Mixtral, whose routing weights are always normalised
        gguf="llama",
        model_type="mixtral",
        answer_format="mistral",
        layers={"MixtralDecoderLayer": LayerKind(takes_models_window=True)},
        alias="mixtral",
        skeleton=_PLAIN_SKELETON | {"num_hidden_layers": 32},
        checkpoint_names=(W1_W3_W2, STACKED),
        pre_tokenizers=("llama-bpe", "tekken"),
        keys=_PLAIN_WIDTH | {"intermediate_size": "feed_forward_length"},
        optional_keys={"head_dim": "attention.key_length"},
        transforms=_PAIRED_ROTARY,
    ),
    Architecture(
        gguf="olmoe",
        model_type="olmoe",
        layers={"OlmoeDecoderLayer": LayerKind()},
        pre_tokenizers=("olmo",),
        skeleton=without(GQA_SKELETON, "moe_intermediate_size") | {"num_hidden_layers": 16, "num_experts": 4},
        keys=without(GQA_KEYS, "moe_intermediate_size") | {"intermediate_size": "feed_forward_length"},
        constants={"norm_topk_prob": False, "clip_qkv": None},  # llama.cpp's reading of the family
    ),
    replace(_GRANITE, variant=_shared_width, variants={"shared": GRANITE_SHARED}),
    _LING,
    Architecture(
        gguf="minimax-m2",
        model_type="minimax_m2",
        published_config=lambda config: {
            "scoring_func": "sigmoid",
            "use_routing_bias": True,
            "rotary_dim": int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0)),
        },
        answer_format="minimax",
        layers={"MiniMaxM2DecoderLayer": LayerKind()},
        skeleton=_PLAIN_SKELETON | {"num_hidden_layers": 62, "head_dim": 16},
        checkpoint_names=(W1_W3_W2, STACKED),
        pre_tokenizers=("minimax-m2",),
        keys=_PLAIN_WIDTH | {"intermediate_size": "expert_feed_forward_length", "head_dim": "attention.key_length"},
        derive=_minimax,
        names={_MINIMAX_BIAS: CORRECTION},
        float32=(_MINIMAX_BIAS,),
        router_inputs=("e_score_correction_bias",),
    ),
    Architecture(
        gguf="ernie4_5-moe",
        model_type="ernie4_5_moe",
        answer_format="hermes",
        layers={"Ernie4_5_MoeDecoderLayer": LayerKind(is_paired=True)},
        shared_experts={"Ernie4_5_MoeSparseMoeBlock": "shared_experts"},
        skeleton=without(GQA_SKELETON, "num_experts_per_tok")
        | {"num_hidden_layers": 28, "moe_num_experts": 4, "moe_k": 2},
        keys=without(DECODER_KEYS, "num_experts_per_tok")
        | {
            "num_key_value_heads": "attention.head_count_kv",
            "intermediate_size": "feed_forward_length",
            "moe_k": "expert_used_count",
            "moe_num_experts": "expert_count",
            "moe_layer_start_index": "leading_dense_block_count",
            "moe_layer_interval": "interleave_moe_layer_step",
        },
        optional_keys={"moe_num_shared_experts": "expert_shared_count", "head_dim": "attention.key_length"},
        present={"use_bias": "blk.0.attn_q.bias"},
        derive=_ernie,
        names={_ERNIE_BIAS: CORRECTION},
        float32=(_ERNIE_BIAS, "mlp.gate.weight"),
    ),
)
