"""Step-3.5 and 3.7: windows with more heads in most layers, gates on heads, and clamped experts in the last ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrimoe_kt.errors import ModelError
from hybrimoe_kt.expert_form import SWIGLU, ExpertForm
from hybrimoe_kt.weights.checkpoint import ExpertNames

from .base import STACKED, Architecture, Key
from .common import CORRECTION, GQA_KEYS, GQA_SKELETON, OFFSET_NORMS, SIGMOID, only_gated_by, scale, windows, without

__all__ = ["FAMILIES"]

_BIAS = "mlp.gate.e_score_correction_bias"
_EACH = ExpertNames("moe.gate_proj.weight", "moe.up_proj.weight", "moe.down_proj.weight")


def _form(config: Any, layer: int) -> ExpertForm:
    limit = config.swiglu_limits[layer] if config.swiglu_limits else None
    return ExpertForm(limit=limit, cuts_activated=True) if limit else SWIGLU


def _derived(key: Key) -> Mapping[str, Any]:
    only_gated_by("step35", SIGMOID, key)
    if not key("expert_weights_norm", False):
        raise ModelError("step35 without normalised routing weights is not supported; every released model has them so")
    if key("moe_every_n_layers", 1) not in (0, 1):
        raise ModelError(
            "step35 with dense layers between those of experts is not supported; no released model has any"
        )
    if key("rope.scaling.attn_factor", 1.0) != 1.0:
        raise ModelError("step35 with rope.scaling.attn_factor is not supported; no released model has one")
    count, dense, width = key("block_count"), key("leading_dense_block_count", 0), key("attention.key_length")
    found = windows(key)
    rotated = key("rope.dimension_count", width)
    dims = {"full_attention": rotated // 2, "sliding_attention": key("rope.dimension_count_swa", rotated)}
    limits = {
        name: key(f"swiglu_clamp_{ending}", [0.0], of_each_layer=True)[:count]
        for name, ending in (("swiglu_limits", "exp"), ("swiglu_limits_shared", "shexp"))
    }
    return (
        found
        | _heads(key, found["layer_types"])
        | {
            "mlp_layer_types": ["dense"] * dense + ["sparse"] * (count - dense),
            "moe_router_scaling_factor": scale(key),
            "rope_parameters": {
                kind: {"partial_rotary_factor": dims[kind] / width} for kind in set(found["layer_types"])
            },
            **{name: values for name, values in limits.items() if any(values)},
        }
    )


def _heads(key: Key, kinds: list[str]) -> dict[str, Any]:
    """How many heads a layer of each kind has."""
    heads = key("attention.head_count", of_each_layer=True)[: key("block_count")]
    of_kind = {kind: {number for number, own in zip(heads, kinds, strict=True) if own == kind} for kind in set(kinds)}
    if any(len(numbers) > 1 for numbers in of_kind.values()):
        raise ModelError(f"step35 whose layers of one kind have {heads[:8]} heads is not supported")
    full = of_kind.get("full_attention") or {max(heads)}
    return {
        "num_attention_heads": next(iter(full)),
        "num_sliding_attention_heads": next(iter(of_kind.get("sliding_attention") or full)),
    }


FAMILIES = (
    Architecture(
        gguf="step35",
        model_type="step3p5",
        answer_format="qwen-xml",
        pre_tokenizers=("deepseek-v3",),
        skeleton=without(GQA_SKELETON, "num_experts")
        | {
            "num_hidden_layers": 45,
            "head_dim": 16,
            "n_routed_experts": 4,
            "share_expert_dim": 32,
            "num_sliding_attention_heads": 6,
            "sliding_window": 8,
            "layer_types": (["full_attention"] + ["sliding_attention"] * 3) * 11 + ["full_attention"],
        },
        checkpoint_type="step3p7",
        checkpoint_names=(_EACH, STACKED),
        tensor_table="dots1",
        keys=without(GQA_KEYS, "num_attention_heads", "num_experts")
        | {
            "head_dim": "attention.key_length",
            "n_routed_experts": "expert_count",
            "intermediate_size": "feed_forward_length",
            "share_expert_dim": "expert_shared_feed_forward_length",
        },
        constants={"pad_token_id": 1},  # its configuration takes no other word for none
        derive=_derived,
        names={_BIAS: CORRECTION, "self_attn.g_proj.weight": "blk.{layer}.attn_gate.weight"},
        transforms=OFFSET_NORMS,
        float32=(_BIAS, "mlp.gate.weight"),
        has_rotary_kinds=True,
        norm_offset=1.0,
        expert_form=_form,
    ),
)
