"""MiniMax-M3: experts cut as gpt-oss's are, and attention to the blocks of tokens that an indexer finds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrimoe_kt.errors import ModelError
from hybrimoe_kt.expert_form import ExpertForm

from .base import STACKED, W1_W3_W2, Architecture, Key
from .common import (
    CORRECTION,
    GQA_KEYS,
    GQA_SKELETON,
    OFFSET_NORMS,
    SIGMOID,
    only_gated_by,
    partial_rotary,
    scale,
    stacked,
    without,
)

__all__ = ["FAMILIES"]

_SPARSE, _DENSE = "minimax_m3_sparse", "full_attention"
_ALPHA, _LIMIT = 1.702, 7.0  # no key says them; llama.cpp knows no others


def _minimax(key: Key) -> Mapping[str, Any]:
    only_gated_by("minimax-m3", SIGMOID, key)
    if not key("expert_weights_norm", False):
        raise ModelError("minimax-m3 normalises routing weights in every released model; nothing else is supported")
    count, dense = key("block_count"), key("leading_dense_block_count", 0)
    width = key("expert_feed_forward_length")
    return {
        "partial_rotary_factor": partial_rotary(key),
        "rotary_dim": key("rope.dimension_count", key("attention.key_length")),
        "routed_scaling_factor": scale(key),
        "shared_intermediate_size": width * key("expert_shared_count", 1),
        "mlp_layer_types": ["dense"] * dense + ["sparse"] * (count - dense),
        "layer_types": [_DENSE] * dense + [_SPARSE] * (count - dense),
    }


def _cut(config: Any, layer: int) -> ExpertForm:
    return ExpertForm(alpha=config.swiglu_alpha, limit=config.swiglu_limit, up_offset=1.0)


_BIAS = "mlp.gate.e_score_correction_bias"
_INDEXER = "self_attn.indexer."

FAMILIES = (
    Architecture(
        gguf="minimax-m3",
        model_type="minimax_m3_vl_text",
        checkpoint_type="minimax_m3_vl",
        answer_format="minimax",
        pre_tokenizers=("minimax-m2",),
        skeleton=without(GQA_SKELETON, "moe_intermediate_size", "num_experts")
        | {"num_hidden_layers": 60, "head_dim": 16, "rotary_dim": 8, "num_local_experts": 4}
        | {"mlp_layer_types": ["dense"] * 3 + ["sparse"] * 57, "layer_types": [_DENSE] * 3 + [_SPARSE] * 57}
        | {"dense_intermediate_size": 64, "shared_intermediate_size": 32, "index_head_dim": 16, "index_n_heads": 2},
        checkpoint_names=(
            W1_W3_W2,
            STACKED,
        ),
        keys=without(GQA_KEYS, "moe_intermediate_size", "num_experts")
        | {
            "num_local_experts": "expert_count",
            "intermediate_size": "expert_feed_forward_length",
            "dense_intermediate_size": "feed_forward_length",
            "head_dim": "attention.key_length",
            "index_n_heads": "attention.indexer.head_count",
            "index_head_dim": "attention.indexer.key_length",
            "index_topk_blocks": "attention.indexer.top_k",
            "index_block_size": "attention.indexer.block_size",
            "index_local_blocks": "attention.indexer.local_blocks",
        },
        constants={"swiglu_alpha": _ALPHA, "swiglu_limit": _LIMIT},
        derive=_minimax,
        tensor_table="minimax-m2",
        names={
            _BIAS: CORRECTION,
            "mlp.down_proj.weight": "blk.{layer}.ffn_down.weight",
            "mlp.gate.weight": "blk.{layer}.ffn_gate_inp.weight",
            "mlp.shared_experts.down_proj.weight": "blk.{layer}.ffn_down_shexp.weight",
            **{
                f"{_INDEXER}{name}.weight": f"blk.{{layer}}.indexer.{name}.weight"
                for name in ("q_proj", "k_proj", "q_norm", "k_norm")
            },
        },
        composed={
            "mlp.gate_up_proj.weight": stacked("ffn_gate", "ffn_up"),
            "mlp.shared_experts.gate_up_proj.weight": stacked("ffn_gate_shexp", "ffn_up_shexp"),
        },
        transforms=OFFSET_NORMS,
        float32=(_BIAS,),
        norm_offset=1.0,
        expert_form=_cut,
    ),
)
