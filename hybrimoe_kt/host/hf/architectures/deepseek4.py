"""DeepSeek-V4: several residual streams, compressed tokens beside a window, first layers that route by a token's id."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hybrimoe_kt.errors import ModelError
from hybrimoe_kt.expert_form import ExpertForm
from hybrimoe_kt.weights.checkpoint import ExpertNames

from .base import ONE_EACH, STACKED, Architecture, Key, gated_form
from .common import CORRECTION, DECODER_KEYS, SKELETON, scale

__all__ = ["FAMILIES"]

_SQRT_SOFTPLUS = 4  # of the GGUF key expert_gating_func
_SPARSE, _HEAVY = 4, 128
_ROTARY = "main", "compress"
_KINDS = {0: "sliding_attention", _SPARSE: "compressed_sparse_attention", _HEAVY: "heavily_compressed_attention"}
"""What a layer does, by how many tokens it compresses into one."""


def _deepseek4(key: Key) -> Mapping[str, Any]:
    ratios = key("attention.compress_ratios", [], of_each_layer=True)[: key("block_count")]
    if len(ratios) < key("block_count") or not set(ratios) <= _KINDS.keys():
        raise ModelError(f"attention.compress_ratios {ratios} are not one of {sorted(_KINDS)} for each layer")
    if key("expert_gating_func") != _SQRT_SOFTPLUS or not key("expert_weights_norm", False):
        raise ModelError("deepseek4 routes by normalised sqrtsoftplus in every released model; no other is supported")
    limit, shared = key("swiglu_clamp_exp"), key("swiglu_clamp_shexp")
    if limit is None or shared not in (limit, None):
        raise ModelError(f"experts cut at {limit} and shared ones at {shared} are not supported")
    rotated = key("rope.dimension_count") / key("attention.key_length")
    hashed = key("hash_layer_count", 0)
    return {
        "layer_types": [_KINDS[ratio] for ratio in ratios],
        "mlp_layer_types": ["hash_moe" if layer < hashed else "moe" for layer in range(len(ratios))],
        "partial_rotary_factor": rotated,
        "rope_parameters": {kind: {"partial_rotary_factor": rotated} for kind in _ROTARY},
        "swiglu_limit": limit,
        "routed_scaling_factor": scale(key),
    }


def _cut(config: Any, layer: int) -> ExpertForm:
    return replace(gated_form(config), limit=float(config.swiglu_limit))


_ATTENTION, _COMPRESSOR, _INDEXER = "self_attn.", "self_attn.compressor.", "self_attn.compressor.indexer."


def _compressed(ours: str, theirs: str) -> dict[str, str]:
    """What compresses tokens, for attention or for its indexer."""
    pairs = {"kv_proj.weight": "kv", "gate_proj.weight": "gate", "position_bias": "ape", "kv_norm.weight": "norm"}
    return {ours + name: f"blk.{{layer}}.{theirs}_compressor_{stored}.weight" for name, stored in pairs.items()}


def _streams(ours: str, theirs: str) -> dict[str, str]:
    """What mixes the residual streams."""
    return {f"{ours}.{name}": f"blk.{{layer}}.hc_{theirs}_{name}.weight" for name in ("fn", "base", "scale")}


_BIAS = "mlp.gate.e_score_correction_bias"

FAMILIES = (
    Architecture(
        gguf="deepseek4",
        model_type="deepseek_v4",
        answer_format="dsml",
        shared_experts={"DeepseekV4SparseMoeBlock": "shared_experts"},
        pre_tokenizers=("deepseek-v3", "joyai-llm"),
        checkpoint_names=(
            ExpertNames.like("ffn.experts.{expert}.{matrix}.weight", gate="w1", up="w3", down="w2"),
            ONE_EACH,
            STACKED,
        ),
        skeleton=SKELETON
        | {
            "num_hidden_layers": 43,
            "head_dim": 16,
            "q_lora_rank": 16,
            "n_routed_experts": 4,
            "partial_rotary_factor": 0.5,
        }
        | {"o_groups": 2, "o_lora_rank": 8, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 4, "hc_mult": 2},
        keys={
            **DECODER_KEYS,
            "head_dim": "attention.key_length",
            "q_lora_rank": "attention.q_lora_rank",
            "n_routed_experts": "expert_count",
            "n_shared_experts": "expert_shared_count",
            "sliding_window": "attention.sliding_window",
            "o_groups": "attention.output_group_count",
            "o_lora_rank": "attention.output_lora_rank",
            "compress_rope_theta": "attention.compress_rope_freq_base",
            "index_n_heads": "attention.indexer.head_count",
            "index_head_dim": "attention.indexer.key_length",
            "index_topk": "attention.indexer.top_k",
            "hc_mult": "hyper_connection.count",
            "hc_sinkhorn_iters": "hyper_connection.sinkhorn_iterations",
            "hc_eps": "hyper_connection.epsilon",
        },
        derive=_deepseek4,
        tensor_table="deepseek2",
        names={
            _BIAS: CORRECTION,
            "mlp.gate.tid2eid": "blk.{layer}.ffn_gate_tid2eid.weight",
            _ATTENTION + "q_a_norm.weight": "blk.{layer}.attn_q_a_norm.weight",
            _ATTENTION + "kv_proj.weight": "blk.{layer}.attn_kv.weight",
            _ATTENTION + "kv_norm.weight": "blk.{layer}.attn_kv_a_norm.weight",
            _ATTENTION + "o_a_proj.weight": "blk.{layer}.attn_output_a.weight",
            _ATTENTION + "o_b_proj.weight": "blk.{layer}.attn_output_b.weight",
            _ATTENTION + "sinks": "blk.{layer}.attn_sinks.weight",
            _INDEXER + "q_b_proj.weight": "blk.{layer}.indexer.attn_q_b.weight",
            _INDEXER + "scorer.weights_proj.weight": "blk.{layer}.indexer.proj.weight",
            **{f"hc_head.hc_{name}": f"output_hc_{name}.weight" for name in ("fn", "base", "scale")},
            **_compressed(_COMPRESSOR, "attn"),
            **_compressed(_INDEXER, "indexer"),
            **_streams("attn_hc", "attn"),
            **_streams("ffn_hc", "ffn"),
        },
        float32=(
            _BIAS,
            "_hc.fn",
            "_hc.base",
            "_hc.scale",
            "hc_head.hc_fn",
            "hc_head.hc_base",
            "hc_head.hc_scale",
            "sinks",
            "position_bias",
            "norm.weight",
        ),
        own_rotary_kinds=_ROTARY,
        attention="eager",
        layers_take_ids=True,
        expert_form=_cut,
    ),
)
