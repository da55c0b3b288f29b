"""Cohere's models with experts: attention and experts beside each other behind one norm, and windows in most layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrimoe_kt.errors import ModelError

from .base import Architecture, Key
from .common import GQA_KEYS, GQA_SKELETON, SIGMOID, only_gated_by, scale, windows, without

__all__ = ["FAMILIES"]

_BLOCK = "blk.{layer}."


def _cohere(key: Key) -> Mapping[str, Any]:
    only_gated_by("cohere2moe", SIGMOID, key)
    if key("attention.sliding_window_pattern") is None:
        raise ModelError("cohere2moe without attention.sliding_window_pattern is not supported; every file has it")
    if (factor := scale(key)) != 1.0:
        raise ModelError(f"cohere2moe with expert_weights_scale {factor:g} is not supported; no released model has one")
    count, dense = key("block_count"), key("leading_dense_block_count", 0)
    return windows(key) | {
        "rms_norm_eps": key("attention.layer_norm_rms_epsilon", 0.0) or None,
        "mlp_layer_types": ["dense"] * dense + ["sparse"] * (count - dense),
        "norm_topk_prob": key("expert_weights_norm", False),
    }


FAMILIES = (
    Architecture(
        gguf="cohere2moe",
        model_type="cohere2_moe",
        rules="qwen3moe",
        pre_tokenizers=("cohere2moe",),
        tensor_table="cohere2",
        skeleton=without(GQA_SKELETON, "moe_intermediate_size")
        | {
            "num_hidden_layers": 49,
            "num_experts": 4,
            "num_shared_experts": 1,
            "head_dim": 16,
            "prefix_dense_intermediate_size": 64,
            "first_k_dense_replace": 1,
            "rms_norm_eps": 1e-5,
        },
        keys=without(GQA_KEYS, "moe_intermediate_size", "rms_norm_eps")
        | {
            "intermediate_size": "expert_feed_forward_length",
            "prefix_dense_intermediate_size": "feed_forward_length",
            "head_dim": "attention.key_length",
            "logit_scale": "logit_scale",
        },
        optional_keys={
            "num_shared_experts": "expert_shared_count",
            "layer_norm_eps": "attention.layer_norm_epsilon",
        },
        constants={"expert_selection_fn": "sigmoid", "prefix_dense_sliding_window_pattern": 1},
        derive=_cohere,
        names={
            "lm_head.weight": "output.weight",
            "mlp.gate.weight": _BLOCK + "ffn_gate_inp.weight",
            **{
                f"mlp.shared_experts.{name}_proj.weight": f"{_BLOCK}ffn_{name}_shexp.weight"
                for name in ("gate", "up", "down")
            },
        },
        expert_norm="input_layernorm",
    ),
)
