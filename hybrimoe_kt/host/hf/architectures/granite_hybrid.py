"""Granite 4: a state space in most layers, attention without positions in the others, experts in all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hybrimoe_kt.errors import ModelError

from .base import Key
from .common import STATE_SPACE_TRANSFORMS
from .others import GRANITE_SHARED

__all__ = ["FAMILIES"]

_BLOCK = "blk.{layer}."


def _layers(key: Key) -> Mapping[str, Any]:
    if key("rope.scaling.finetuned", False):
        raise ModelError("granitehybrid with rotary positions is not supported; no released model has them")
    heads = key("attention.head_count_kv", of_each_layer=True)[: key("block_count")]
    return {
        "layer_types": ["full_attention" if count else "linear_attention" for count in heads],
        "num_key_value_heads": max(heads),
        "mamba_d_head": key("ssm.inner_size") // key("ssm.time_step_rank"),
        "mamba_expand": key("ssm.inner_size") // key("embedding_length"),
        "position_embedding_type": "nope",
    }


FAMILIES = (
    replace(
        GRANITE_SHARED,
        gguf="granitehybrid",
        alias="",
        model_type="granitemoehybrid",
        rules="",
        layers={},
        skeleton={
            **GRANITE_SHARED.skeleton,
            "num_hidden_layers": 40,
            "layer_types": ["linear_attention"] * 5
            + (["full_attention"] + ["linear_attention"] * 9) * 3
            + ["full_attention"]
            + ["linear_attention"] * 4,
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
        },
        keys={name: key for name, key in GRANITE_SHARED.keys.items() if name != "num_key_value_heads"}
        | {
            "mamba_n_heads": "ssm.time_step_rank",
            "mamba_d_state": "ssm.state_size",
            "mamba_n_groups": "ssm.group_count",
            "mamba_d_conv": "ssm.conv_kernel",
        },
        derive=_layers,
        names={
            **GRANITE_SHARED.names,
            "mamba.in_proj.weight": _BLOCK + "ssm_in.weight",
            "mamba.conv1d.weight": _BLOCK + "ssm_conv1d.weight",
            "mamba.conv1d.bias": _BLOCK + "ssm_conv1d.bias",
            "mamba.dt_bias": _BLOCK + "ssm_dt.bias",
            "mamba.A_log": _BLOCK + "ssm_a",
            "mamba.D": _BLOCK + "ssm_d",
            "mamba.norm.weight": _BLOCK + "ssm_norm.weight",
            "mamba.out_proj.weight": _BLOCK + "ssm_out.weight",
        },
        transforms={
            **GRANITE_SHARED.transforms,
            **{f"mamba.{name}": how for name, how in STATE_SPACE_TRANSFORMS.items()},
        },
    ),
)
