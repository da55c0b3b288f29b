"""MiniMax-M3: clamped experts behind dense layers, and attention to the blocks of tokens that an indexer finds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hybrimoe_kt.errors import ModelError
from hybrimoe_kt.expert_form import ExpertForm

from .base import STACKED, W1_W3_W2, Architecture, Composed, Key
from .common import (
    CORRECTION,
    GQA_KEYS,
    GQA_SKELETON,
    OFFSET_NORMS,
    SIGMOID,
    only_gated_by,
    partial_rotary,
    scale,
    without,
)

__all__ = ["FAMILIES"]

_BIAS = "mlp.gate.e_score_correction_bias"
_INDEXER = "self_attn.indexer."


def _clamped(config: Any, layer: int) -> ExpertForm:
    return ExpertForm(alpha=config.swiglu_alpha, limit=config.swiglu_limit, up_offset=1.0)


def _derived(key: Key) -> Mapping[str, Any]:
    """Layers with experts are those with indexers, as in llama.cpp and in every released model."""
    only_gated_by("minimax-m3", SIGMOID, key)
    if not key("expert_weights_norm", False):
        raise ModelError(
            "minimax-m3 without normalised routing weights is not supported; every released model has them so"
        )
    dense = key("leading_dense_block_count", 0)
    sparse = key("block_count") - dense
    return {
        "layer_types": ["full_attention"] * dense + ["minimax_m3_sparse"] * sparse,
        "mlp_layer_types": ["dense"] * dense + ["sparse"] * sparse,
        "partial_rotary_factor": partial_rotary(key),
        "routed_scaling_factor": scale(key),
    }


def _gate_up(ending: str) -> Composed:
    """Gate above up, of a dense MLP."""
    return Composed(
        (f"blk.{{layer}}.ffn_gate{ending}.weight", f"blk.{{layer}}.ffn_up{ending}.weight"),
        lambda gate, up, key: torch.cat((gate, up)),
        lambda gate, up, key: (gate[0] + up[0], gate[1]),
        moves="rows",
    )


FAMILIES = (
    Architecture(
        gguf="minimax-m3",
        model_type="minimax_m3_vl_text",
        answer_format="minimax",
        pre_tokenizers=("minimax-m2",),
        skeleton=GQA_SKELETON
        | {
            "num_hidden_layers": 60,
            "head_dim": 16,
            "num_local_experts": 4,
            "dense_intermediate_size": 64,
            "shared_intermediate_size": 32,
            "layer_types": ["full_attention"] * 3 + ["minimax_m3_sparse"] * 57,
            "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 57,
            "index_n_heads": 2,
            "index_head_dim": 16,
        },
        checkpoint_type="minimax_m3_vl",
        checkpoint_names=(W1_W3_W2, STACKED),
        tensor_table="dots1",
        keys=without(GQA_KEYS, "moe_intermediate_size", "num_experts")
        | {
            "num_local_experts": "expert_count",
            "intermediate_size": "expert_feed_forward_length",
            "dense_intermediate_size": "feed_forward_length",
            "shared_intermediate_size": "expert_shared_feed_forward_length",
            "head_dim": "attention.key_length",
            "index_n_heads": "attention.indexer.head_count",
            "index_head_dim": "attention.indexer.key_length",
            "index_block_size": "attention.indexer.block_size",
            "index_topk_blocks": "attention.indexer.top_k",
            "index_local_blocks": "attention.indexer.local_blocks",
        },
        derive=_derived,
        names={
            _BIAS: CORRECTION,
            "mlp.gate_up_proj.weight": "",  # two tensors; gguf-py's table has the name for one
            _INDEXER + "q_proj.weight": "blk.{layer}.indexer.q_proj.weight",
            _INDEXER + "k_proj.weight": "blk.{layer}.indexer.k_proj.weight",
            _INDEXER + "q_norm.weight": "blk.{layer}.indexer.q_norm.weight",
            _INDEXER + "k_norm.weight": "blk.{layer}.indexer.k_norm.weight",
        },
        composed={
            "mlp.gate_up_proj.weight": _gate_up(""),
            "mlp.shared_experts.gate_up_proj.weight": _gate_up("_shexp"),
        },
        transforms=OFFSET_NORMS,
        float32=(_BIAS, "mlp.gate.weight"),
        norm_offset=1.0,
        expert_form=_clamped,
    ),
)
