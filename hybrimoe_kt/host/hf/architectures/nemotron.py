"""Nemotron 3: a layer is a state space, attention, or experts without a gate, some in a narrower space of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrimoe_kt.errors import ModelError
from hybrimoe_kt.expert_form import ExpertForm
from hybrimoe_kt.weights.checkpoint import ExpertNames

from .base import Architecture, Key, gated_form
from .common import CORRECTION, DECODER_KEYS, SIGMOID, SKELETON, STATE_SPACE_TRANSFORMS, only_gated_by, scale, without

__all__ = ["FAMILIES"]

_BLOCK, _EXPERTS = "blk.{layer}.", "mixer.experts."
_ONE_EACH = ExpertNames("", _EXPERTS + "{expert}.up_proj.weight", _EXPERTS + "{expert}.down_proj.weight")
_STACKED = ExpertNames("", _EXPERTS + "up_proj", _EXPERTS + "down_proj")
_BIAS = "mixer.gate.e_score_correction_bias"


def _without_a_gate(config: Any, layer: int) -> ExpertForm:
    return gated_form(config, is_gated=False)


def _nemotron(key: Key) -> Mapping[str, Any]:
    only_gated_by("nemotron_h_moe", SIGMOID, key)
    if key("attention.layer_norm_epsilon", key("attention.layer_norm_rms_epsilon")) != key(
        "attention.layer_norm_rms_epsilon"
    ):
        raise ModelError("nemotron_h_moe with two epsilons of norms is not supported; they are one and the same")
    heads = key("attention.head_count_kv", of_each_layer=True)[: key("block_count")]
    widths = key("feed_forward_length", of_each_layer=True)[: key("block_count")]
    if any(head and width for head, width in zip(heads, widths, strict=True)):
        raise ModelError("nemotron_h_moe with attention and experts in one layer is not supported")
    return {
        "layers_block_type": [
            "full_attention" if head else "moe" if width else "linear_attention"
            for head, width in zip(heads, widths, strict=True)
        ],
        "num_key_value_heads": max(heads),
        "mamba_head_dim": key("ssm.inner_size") // key("ssm.time_step_rank"),
        "norm_topk_prob": key("expert_weights_norm", False),
        "routed_scaling_factor": scale(key),
        "n_group": key("expert_group_count", 1),
        "topk_group": key("expert_group_used_count", 1),
    }


FAMILIES = (
    Architecture(
        gguf="nemotron_h_moe",
        model_type="nemotron_h",
        answer_format="qwen-xml",
        pre_tokenizers=("pixtral",),
        skeleton=without(SKELETON, "intermediate_size")
        | {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"] * 13,
            "n_routed_experts": 4,
            "moe_shared_expert_intermediate_size": 32,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 2,
        },
        checkpoint_names=(_ONE_EACH, _STACKED),
        keys=without(DECODER_KEYS, "rms_norm_eps")
        | {
            "head_dim": "attention.key_length",
            "layer_norm_epsilon": "attention.layer_norm_rms_epsilon",
            "n_routed_experts": "expert_count",
            "moe_shared_expert_intermediate_size": "expert_shared_feed_forward_length",
            "mamba_num_heads": "ssm.time_step_rank",
            "ssm_state_size": "ssm.state_size",
            "n_groups": "ssm.group_count",
            "conv_kernel": "ssm.conv_kernel",
        },
        optional_keys={"n_shared_experts": "expert_shared_count", "moe_latent_size": "moe_latent_size"},
        derive=_nemotron,
        names={
            "mixer.in_proj.weight": _BLOCK + "ssm_in.weight",
            "mixer.conv1d.weight": _BLOCK + "ssm_conv1d.weight",
            "mixer.conv1d.bias": _BLOCK + "ssm_conv1d.bias",
            "mixer.dt_bias": _BLOCK + "ssm_dt.bias",
            "mixer.A_log": _BLOCK + "ssm_a",
            "mixer.D": _BLOCK + "ssm_d",
            "mixer.norm.weight": _BLOCK + "ssm_norm.weight",
            "mixer.out_proj.weight": _BLOCK + "ssm_out.weight",
            "mixer.q_proj.weight": _BLOCK + "attn_q.weight",
            "mixer.k_proj.weight": _BLOCK + "attn_k.weight",
            "mixer.v_proj.weight": _BLOCK + "attn_v.weight",
            "mixer.o_proj.weight": _BLOCK + "attn_output.weight",
            _BIAS: CORRECTION,
            "mixer.gate.weight": _BLOCK + "ffn_gate_inp.weight",
            "mixer.shared_experts.up_proj.weight": _BLOCK + "ffn_up_shexp.weight",
            "mixer.shared_experts.down_proj.weight": _BLOCK + "ffn_down_shexp.weight",
            "mixer.fc1_latent_proj.weight": _BLOCK + "ffn_latent_down.weight",
            "mixer.fc2_latent_proj.weight": _BLOCK + "ffn_latent_up.weight",
        },
        transforms={f"mixer.{name}": how for name, how in STATE_SPACE_TRANSFORMS.items()},
        float32=(_BIAS, "mixer.gate.weight"),
        expert_norm="norm",
        expert_form=_without_a_gate,
    ),
)
