"""LFM2-MoE: short convolutions in most layers, attention in the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrimoe_kt.weights.checkpoint import ExpertNames

from .base import Architecture, Key
from .common import CHANNELS, CORRECTION, GQA_KEYS, GQA_SKELETON, SIGMOID, only_gated_by, scale, without

__all__ = ["FAMILIES"]

_BIAS, _BLOCK = "feed_forward.expert_bias", "feed_forward.experts."
_ONE_EACH = ExpertNames(_BLOCK + "{expert}.w1.weight", _BLOCK + "{expert}.w3.weight", _BLOCK + "{expert}.w2.weight")
_STACKED = ExpertNames(_BLOCK + "gate_up_proj", _BLOCK + "gate_up_proj", _BLOCK + "down_proj")


def _layers(key: Key) -> Mapping[str, Any]:
    only_gated_by("lfm2moe", SIGMOID, key)
    heads = key("attention.head_count_kv", of_each_layer=True)[: key("block_count")]
    return {
        "layer_types": ["full_attention" if count else "conv" for count in heads],
        "norm_topk_prob": key("expert_weights_norm", True),
        "routed_scaling_factor": scale(key),
    }


FAMILIES = (
    Architecture(
        gguf="lfm2moe",
        model_type="lfm2_moe",
        answer_format="lfm2",
        pre_tokenizers=("lfm2",),
        skeleton=GQA_SKELETON
        | {"num_hidden_layers": 24, "num_experts": 4, "num_dense_layers": 2}
        | {"layer_types": ["conv", "conv", "full_attention", "conv"] * 6},
        checkpoint_names=(_ONE_EACH, _STACKED),
        keys=without(GQA_KEYS, "rms_norm_eps")
        | {
            "norm_eps": "attention.layer_norm_rms_epsilon",
            "intermediate_size": "feed_forward_length",
            "num_dense_layers": "leading_dense_block_count",
            "conv_L_cache": "shortconv.l_cache",
        },
        constants={"conv_bias": False, "use_expert_bias": True},
        derive=_layers,
        names={
            _BIAS: CORRECTION,
            "feed_forward.gate.weight": "blk.{layer}.ffn_gate_inp.weight",
            "feed_forward.w1.weight": "blk.{layer}.ffn_gate.weight",
            "feed_forward.w3.weight": "blk.{layer}.ffn_up.weight",
            "feed_forward.w2.weight": "blk.{layer}.ffn_down.weight",
            "operator_norm.weight": "blk.{layer}.attn_norm.weight",
            "ffn_norm.weight": "blk.{layer}.ffn_norm.weight",
            "self_attn.out_proj.weight": "blk.{layer}.attn_output.weight",
            "self_attn.q_layernorm.weight": "blk.{layer}.attn_q_norm.weight",
            "self_attn.k_layernorm.weight": "blk.{layer}.attn_k_norm.weight",
            "conv.conv.weight": "blk.{layer}.shortconv.conv.weight",
            "conv.in_proj.weight": "blk.{layer}.shortconv.in_proj.weight",
            "conv.out_proj.weight": "blk.{layer}.shortconv.out_proj.weight",
            "model.embedding_norm.weight": "token_embd_norm.weight",
            "lm_head.weight": "output.weight",
        },
        float32=(_BIAS,),
        transforms={"conv.conv.weight": CHANNELS},
        router_inputs=("expert_bias",),
        expert_norm="ffn_norm",
    ),
)
