"""Kimi-Linear and Ling 3: linear attention that decays by channel, latent attention, DeepSeek-V3's experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hybrimoe_kt.errors import ModelError

from .base import ONE_EACH, STACKED, W1_W3_W2, Architecture, Composed, Key, Transform
from .common import CORRECTION, DECODER_KEYS, SIGMOID, only_gated_by, scale
from .deepseek import KV_B, LATENT_SKELETON, even_out_norms

__all__ = ["FAMILIES"]


def _delta(key: Key, *, dense: int) -> dict[str, Any]:
    """Kinds of layers and dimensions of both attentions; `dense` layers come first."""
    count = key("block_count")
    heads = key("attention.head_count_kv", of_each_layer=True)[:count]
    rotated, width = key("rope.dimension_count"), key("attention.key_length_mla")
    return {
        "kv_lora_rank": key("attention.kv_lora_rank"),  # not among the keys, as nothing is sharpened for YaRN
        "layer_types": ["full_attention" if number else "linear_attention" for number in heads],
        "mlp_layer_types": ["dense"] * dense + ["sparse"] * (count - dense),
        "num_key_value_heads": key("attention.head_count"),
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": width - rotated,
        "v_head_dim": key("attention.value_length_mla"),
        "q_lora_rank": key("attention.q_lora_rank"),
        "routed_scaling_factor": scale(key),
    }


def _kimi(key: Key) -> Mapping[str, Any]:
    only_gated_by("kimi-linear", SIGMOID, key)
    groups = {"norm_topk_prob": True, "n_group": 1, "topk_group": 1}
    heads = {"linear_num_heads": key("attention.head_count")}
    return _delta(key, dense=key("leading_dense_block_count", 0)) | groups | heads


def _ling(key: Key) -> Mapping[str, Any]:
    only_gated_by("bailingmoe3", SIGMOID, key)
    if any(key("rope.dimension_sections", [], of_each_layer=True)):
        raise ModelError("bailingmoe3 with positions of pictures (Ling-3.0-flash-VL) is not supported")
    if not key("kda.safe_gate", True):
        raise ModelError("bailingmoe3 bounds its gates in every released model; nothing else is supported")
    return _delta(key, dense=key("leading_dense_block_count")) | {
        "n_group": key("expert_group_count", 1),
        "topk_group": key("expert_group_used_count", 1),
        "norm_topk_prob": key("expert_weights_norm", False),
    }


def _kernels(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, key: Key) -> torch.Tensor:
    """Three depthwise kernels, of a width each, below one another: `[channels, 1, width]`."""
    return torch.cat([kernel.reshape(-1, 1, kernel.shape[-1]) for kernel in (queries, keys, values)])


def _kernels_shape(*shapes: Any) -> tuple[int, ...]:
    *kernels, _ = shapes
    return sum(torch.Size(shape).numel() // shape[-1] for shape in kernels), 1, kernels[0][-1]


_CONVOLVED = {
    "self_attn.conv1d.weight": Composed(
        tuple(f"blk.{{layer}}.ssm_conv1d_{name}.weight" for name in "qkv"), _kernels, _kernels_shape
    )
}
_DECAY = Transform(
    lambda tensor, key: torch.log(-tensor).reshape(1, 1, -1, 1), lambda shape: (1, 1, torch.Size(shape).numel(), 1)
)
_FLAT_DECAY = Transform(lambda tensor, key: torch.log(tensor).reshape(-1), lambda shape: (torch.Size(shape).numel(),))
_BIAS, _FORGET = "mlp.gate.e_score_correction_bias", "self_attn.forget_gate."

FAMILIES = (
    Architecture(
        gguf="kimi-linear",
        model_type="kimi_linear",
        answer_format="kimi",
        shared_experts={"KimiLinearMoE": "shared_experts"},
        pre_tokenizers=("kimi-k2",),
        skeleton={name: value for name, value in LATENT_SKELETON.items() if name != "n_routed_experts"}
        | {"num_hidden_layers": 27, "q_lora_rank": None, "num_local_experts": 4, "linear_head_dim": 16}
        | {"linear_num_heads": 4, "pad_token_id": 0},
        checkpoint_names=(
            W1_W3_W2,
            ONE_EACH,
            STACKED,
        ),
        keys={
            **DECODER_KEYS,
            "num_local_experts": "expert_count",
            "n_shared_experts": "expert_shared_count",
            "intermediate_size": "feed_forward_length",
            "linear_head_dim": "kda.head_dim",
            "linear_conv_kernel_dim": "ssm.conv_kernel",
        },
        derive=_kimi,
        names={
            _BIAS: CORRECTION,
            _FORGET + "A_log": "blk.{layer}.ssm_a",
            _FORGET + "dt_bias": "blk.{layer}.ssm_dt.bias",
            _FORGET + "f_a_proj.weight": "blk.{layer}.ssm_f_a.weight",
            _FORGET + "f_b_proj.weight": "blk.{layer}.ssm_f_b.weight",
        },
        composed=KV_B | _CONVOLVED,
        transforms={"A_log": _DECAY},
        float32=(_BIAS, "mlp.gate.weight", "dt_bias"),
        finish=even_out_norms,
    ),
    Architecture(
        gguf="bailingmoe3",
        model_type="bailing_hybrid",
        answer_format="hermes",
        shared_experts={"BailingHybridMoE": "shared_experts"},
        rules="kimi-linear",
        pre_tokenizers=("bailingmoe2",),
        skeleton={name: value for name, value in LATENT_SKELETON.items() if name != "n_routed_experts"}
        | {"num_hidden_layers": 42, "q_lora_rank": None, "num_local_experts": 4, "head_dim": 16, "n_group": 2}
        | {"topk_group": 1, "pad_token_id": 0},
        keys={
            **DECODER_KEYS,
            "num_local_experts": "expert_count",
            "n_shared_experts": "expert_shared_count",
            "intermediate_size": "feed_forward_length",
            "head_dim": "kda.head_dim",
            "short_conv_kernel_size": "ssm.conv_kernel",
            "kda_lower_bound": "kda.gate_lower_bound",
        },
        derive=_ling,
        tensor_table="kimi-linear",
        names={
            _BIAS: CORRECTION,
            _FORGET + "A_log": "blk.{layer}.ssm_a",
            _FORGET + "dt_bias": "blk.{layer}.ssm_dt.bias",
            _FORGET + "f_proj.weight": "blk.{layer}.ssm_f_a.weight",
            "self_attn.g_proj.weight": "blk.{layer}.attn_gate.weight",
        },
        composed={
            **KV_B,
            **_CONVOLVED,
            "self_attn.g_proj.weight": Composed(  # of layers with linear attention, where it is called so
                ("blk.{layer}.ssm_g_a.weight",), lambda gate, key: gate, lambda gate, key: gate, moves="rows"
            ),
        },
        transforms={"A_log": _FLAT_DECAY},
        float32=(_BIAS, "A_log", "dt_bias"),
        finish=even_out_norms,
    ),
)
