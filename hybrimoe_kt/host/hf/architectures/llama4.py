"""Llama 4: attention in chunks of positions, and to all without positions, and experts of weighed inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrimoe_kt.errors import ModelError
from hybrimoe_kt.weights.checkpoint import ExpertNames

from .base import Architecture, Key
from .common import GQA_KEYS, GQA_SKELETON, without

__all__ = ["FAMILIES"]

_GATE_UP = "feed_forward.experts.gate_up_proj"
_UNNORMALISED = 128  # Maverick's experts; by their number llama.cpp tells whether queries and keys are normalised


def _llama4(key: Key) -> Mapping[str, Any]:
    if key("attention.sliding_window") == 0 or key("attention.sliding_window_pattern", 4) != 4:
        raise ModelError(
            "llama4 attends to chunks in three layers of four; a file that says otherwise is not supported"
        )
    if key("rope.scaling.type", "linear") == "none" and key("rope.scaling.factor", 1.0) not in (0.0, 1.0):
        raise ModelError("llama4 with a factor on positions that are said not to be scaled is not supported")
    if key("expert_used_count", 1) != 1:
        raise ModelError("llama4 gives a token to one expert in every released model; more are not supported")
    return {"use_qk_norm": key("expert_count") != _UNNORMALISED}


FAMILIES = (
    Architecture(
        gguf="llama4",
        model_type="llama4_text",
        answer_format="llama",
        pre_tokenizers=("llama4",),
        skeleton=without(GQA_SKELETON, "moe_intermediate_size", "num_experts")
        | {"num_hidden_layers": 48, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 1}
        | {"intermediate_size": 32, "intermediate_size_mlp": 64, "rope_parameters": {"rope_type": "default"}},
        checkpoint_names=(ExpertNames(_GATE_UP, _GATE_UP, "feed_forward.experts.down_proj", is_transposed=True),),
        keys=without(GQA_KEYS, "moe_intermediate_size", "num_experts")
        | {
            "num_local_experts": "expert_count",
            "intermediate_size": "expert_feed_forward_length",
            "intermediate_size_mlp": "feed_forward_length",
            "head_dim": "attention.key_length",
            "interleave_moe_layer_step": "interleave_moe_layer_step",
        },
        # no key says these: as llama.cpp has them, and every released model
        constants={
            "attention_chunk_size": 8192,
            "no_rope_layer_interval": 4,
            "attn_temperature_tuning": True,
            "floor_scale": 8192,
            "attn_scale": 0.1,
        },
        derive=_llama4,
    ),
)
