"""gpt-oss: experts with biases and a clamped activation, attention sinks, and a window in every other layer."""

from __future__ import annotations

from typing import Any

from hybrimoe_kt.expert_form import ExpertForm
from hybrimoe_kt.weights.checkpoint import ExpertNames

from .base import Architecture, LayerKind
from .common import GQA_KEYS, GQA_SKELETON, without

__all__ = ["FAMILIES"]


_GATE_UP = "mlp.experts.gate_up_proj"
_NAMES = ExpertNames(_GATE_UP, _GATE_UP, "mlp.experts.down_proj", is_transposed=True, is_interleaved=True)


def _clamped(config: Any, layer: int) -> ExpertForm:
    return ExpertForm(alpha=config.swiglu_alpha, limit=config.swiglu_limit, up_offset=1.0, has_biases=True)


FAMILIES = (
    Architecture(
        gguf="gpt-oss",
        model_type="gpt_oss",
        answer_format="harmony",
        layers={"GptOssDecoderLayer": LayerKind()},
        pre_tokenizers=("gpt-4o",),
        skeleton=without(GQA_SKELETON, "moe_intermediate_size")
        | {
            "num_hidden_layers": 36,
            "num_local_experts": 4,
            "head_dim": 16,
            "rope_parameters": {"rope_type": "default"},
        },
        checkpoint_names=(_NAMES,),
        keys=without(GQA_KEYS, "moe_intermediate_size", "num_experts")
        | {
            "num_local_experts": "expert_count",
            "intermediate_size": "expert_feed_forward_length",
            "head_dim": "attention.key_length",
            "sliding_window": "attention.sliding_window",
        },
        names={"self_attn.sinks": "blk.{layer}.attn_sinks.weight"},
        expert_form=_clamped,
        rounds_yarn=False,
    ),
)
