"""Families some of whose layers look back at a window only: K-EXAONE, Mellum 2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import Architecture, Key, LayerKind
from .common import CORRECTION, GQA_KEYS, GQA_SKELETON, SIGMOID, SOFTMAX, only_gated_by, scale, windows

__all__ = ["FAMILIES"]

_GATE_BIAS = "mlp.gate.e_score_correction_bias"
_KEYS = GQA_KEYS | {"intermediate_size": "feed_forward_length", "head_dim": "attention.key_length"}
_SKELETON = GQA_SKELETON | {"num_experts": 4, "head_dim": 16}


def _exaone(key: Key) -> Mapping[str, Any]:
    only_gated_by("exaone-moe", SIGMOID, key)
    return windows(key, 4) | {
        "n_group": key("expert_group_count", 1),
        "topk_group": key("expert_group_used_count", 1),
        "norm_topk_prob": key("expert_weights_norm", False),
        "routed_scaling_factor": scale(key),
    }


def _mellum(key: Key) -> Mapping[str, Any]:
    only_gated_by("mellum", SOFTMAX, key)
    return windows(key, 4)


FAMILIES = (
    Architecture(
        gguf="exaone-moe",
        model_type="exaone_moe",
        answer_format="hermes",
        layers={"ExaoneMoeDecoderLayer": LayerKind(turns_in_windows_only=True)},
        shared_experts={"ExaoneMoeSparseMoEBlock": "shared_experts"},
        rules="glm4moe",
        pre_tokenizers=("exaone-moe",),
        skeleton=_SKELETON | {"num_hidden_layers": 48, "num_shared_experts": 1, "first_k_dense_replace": 1},
        keys=_KEYS | {"first_k_dense_replace": "leading_dense_block_count"},
        optional_keys={"num_shared_experts": "expert_shared_count"},
        derive=_exaone,
        names={_GATE_BIAS: CORRECTION},
        float32=(_GATE_BIAS, "mlp.gate.weight"),
    ),
    Architecture(
        gguf="mellum",
        model_type="mellum",
        layers={"MellumDecoderLayer": LayerKind()},
        rules="qwen3moe",
        pre_tokenizers=("mellum2",),
        skeleton=_SKELETON | {"num_hidden_layers": 28},
        tensor_table="qwen3moe",
        keys=_KEYS,
        constants={"norm_topk_prob": True},
        derive=_mellum,
        has_rotary_kinds=True,
    ),
)
