"""Gemma 4 with experts: a dense layer beside them, wider heads in the layers without a window, norms everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hybrimoe_kt.errors import ModelError
from hybrimoe_kt.weights.checkpoint import ExpertNames
from hybrimoe_kt.weights.gguf_file import GgufFile

from .base import Architecture, Key
from .common import DECODER_KEYS, GQA_SKELETON, without

__all__ = ["FAMILIES"]

_STACKED = ExpertNames("experts.gate_up_proj", "experts.gate_up_proj", "experts.down_proj")
_BLOCK = "blk.{layer}."


def _gemma(key: Key) -> Mapping[str, Any]:
    if key("attention.shared_kv_layers", 0) or key("embedding_length_per_layer_input", 0):
        raise ModelError(
            "gemma4 with shared keys or embeddings for each layer is not supported; the MoE model has none"
        )
    windows = key("attention.sliding_window_pattern", of_each_layer=True)
    heads = key("attention.head_count_kv", of_each_layer=True)
    if windows is None or len({*zip(windows, heads, strict=False)}) > 2 or all(windows):
        raise ModelError("gemma4 without one kind of layers with a window and one without is not supported")
    for ending in ("", "_swa"):
        width = key(f"attention.key_length{ending}")
        for name in (f"attention.value_length{ending}", f"rope.dimension_count{ending}"):
            if key(name, width) != width:
                raise ModelError(f"gemma4 with {name} {key(name)} is not supported; keys there are {width} wide")
    kinds = ["sliding_attention" if has_window else "full_attention" for has_window in windows]
    return {
        "layer_types": kinds,
        "head_dim": key("attention.key_length_swa"),
        "global_head_dim": key("attention.key_length"),
        "num_key_value_heads": heads[windows.index(True)] if any(windows) else heads[0],
        "num_global_key_value_heads": heads[windows.index(False)],
    }


def _shares_values(file: GgufFile, key: Key) -> str | None:
    """Whether the layers without a window have no values of their own."""
    windows = key("attention.sliding_window_pattern", of_each_layer=True) or [True]
    first = windows.index(False) if False in windows else 0
    return "keys" if f"blk.{first}.attn_v.weight" not in file.tensors else None


_GEMMA4 = Architecture(
    gguf="gemma4",
    model_type="gemma4_text",
    answer_format="gemma",
    pre_tokenizers=("gemma4",),
    skeleton=without(GQA_SKELETON, "num_experts_per_tok")
    | {
        "num_hidden_layers": 30,
        "num_experts": 4,
        "top_k_experts": 2,
        "head_dim": 16,
        "global_head_dim": 32,
        "enable_moe_block": True,
        "hidden_size_per_layer_input": 0,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 2,
    },
    checkpoint_names=(_STACKED,),
    keys=without(DECODER_KEYS, "num_experts_per_tok")
    | {
        "intermediate_size": "feed_forward_length",
        "num_experts": "expert_count",
        "top_k_experts": "expert_used_count",
        "sliding_window": "attention.sliding_window",
    },
    optional_keys={"final_logit_softcapping": "final_logit_softcapping"},
    constants={"enable_moe_block": True, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
    derive=_gemma,
    variant=_shares_values,
    names={
        "post_attention_layernorm.weight": _BLOCK + "post_attention_norm.weight",
        "pre_feedforward_layernorm.weight": _BLOCK + "ffn_norm.weight",
        "post_feedforward_layernorm.weight": _BLOCK + "post_ffw_norm.weight",
        "post_feedforward_layernorm_1.weight": _BLOCK + "post_ffw_norm_1.weight",
        "pre_feedforward_layernorm_2.weight": _BLOCK + "pre_ffw_norm_2.weight",
        "post_feedforward_layernorm_2.weight": _BLOCK + "post_ffw_norm_2.weight",
        "router.proj.weight": _BLOCK + "ffn_gate_inp.weight",
        "router.scale": _BLOCK + "ffn_gate_inp.scale",
        "router.per_expert_scale": _BLOCK + "ffn_down_exps.scale",
        "layer_scalar": _BLOCK + "layer_output_scale.weight",
    },
    has_rotary_kinds=True,
    expert_norm="pre_feedforward_layernorm_2",
    router_normalises=True,
    router_gives_probabilities=True,
)

FAMILIES = (
    replace(
        _GEMMA4,
        variants={"keys": replace(_GEMMA4, constants={**_GEMMA4.constants, "attention_k_eq_v": True})},
    ),
)
