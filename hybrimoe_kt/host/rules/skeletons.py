"""Models without weights, to see what a rule file does before any weights are there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from hybrimoe_kt.errors import ModelError, unknown_name
from hybrimoe_kt.host.config_file import read_config

__all__ = ["SKELETONS", "build_skeleton", "skeleton_from_directory"]

_ATTENTION = {"hidden_size": 64, "num_attention_heads": 4, "vocab_size": 64, "intermediate_size": 64}
_GQA = {**_ATTENTION, "num_key_value_heads": 2}
_MLA = {
    **_ATTENTION,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_shared_experts": 1,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LINEAR = {
    "num_experts": 4,
    "shared_expert_intermediate_size": 32,
    "head_dim": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}

# name -> (Transformers model type, configuration): the layer count of a released model, the smallest legal widths.
# Rules see paths and classes only, so widths do not matter and layer counts do.
SKELETONS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3moe": ("qwen3_moe", {**_GQA, **_EXPERTS, "num_hidden_layers": 48, "num_experts": 4, "head_dim": 16}),
    "deepseek2": (  # V2-Lite
        "deepseek_v2",
        {
            **_MLA,
            **_EXPERTS,
            "num_hidden_layers": 27,
            "n_routed_experts": 4,
            "first_k_dense_replace": 1,
            "q_lora_rank": None,
        },
    ),
    "deepseek3": (
        "deepseek_v3",
        {
            **_MLA,
            **_EXPERTS,
            "num_hidden_layers": 61,
            "n_routed_experts": 4,
            "first_k_dense_replace": 3,
            "q_lora_rank": 16,
            "n_group": 2,
            "topk_group": 1,
        },
    ),
    "qwen2moe": (
        "qwen2_moe",
        {**_GQA, **_EXPERTS, "num_hidden_layers": 28, "num_experts": 4, "shared_expert_intermediate_size": 32},
    ),
    "mixtral": ("mixtral", {**_GQA, "num_hidden_layers": 32, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "glm4moe": (  # GLM-4.5-Air
        "glm4_moe",
        {**_GQA, **_EXPERTS, "num_hidden_layers": 46, "n_routed_experts": 4, "first_k_dense_replace": 1},
    ),
    "qwen3next": ("qwen3_next", {**_GQA, **_EXPERTS, **_LINEAR, "num_hidden_layers": 48}),
    "qwen35moe": ("qwen3_5_moe_text", {**_GQA, **_EXPERTS, **_LINEAR, "num_hidden_layers": 40}),
    "granitemoe": ("granitemoe", {**_GQA, "num_hidden_layers": 32, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "minimax-m2": (
        "minimax_m2",
        {**_GQA, "num_hidden_layers": 62, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    ),
    "ernie4_5-moe": (
        "ernie4_5_moe",
        {**_GQA, "num_hidden_layers": 28, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32},
    ),
    "olmoe": ("olmoe", {**_GQA, "num_hidden_layers": 16, "num_experts": 4, "num_experts_per_tok": 2}),
}


def build_skeleton(name: str) -> nn.Module:
    """Return the model of a known architecture on the meta device."""
    from transformers import AutoConfig

    if name not in SKELETONS:
        raise ModelError(f"{unknown_name('architecture', name, SKELETONS)}; or give a directory with a config.json")
    model_type, values = SKELETONS[name]
    return _on_meta(AutoConfig.for_model(model_type, **values))


def skeleton_from_directory(directory: str | Path) -> nn.Module:
    """Return the model that a directory's config.json describes, on the meta device; no weights are read."""
    if not (Path(directory) / "config.json").is_file():
        raise ModelError(f"{directory}: no config.json there; give a model directory or one of {', '.join(SKELETONS)}")
    try:
        return _on_meta(read_config(Path(directory)))
    except Exception as error:  # Transformers raises many kinds for a configuration it cannot use
        raise ModelError(f"{directory}: config.json describes no model known here: {_in_one_line(error)}") from None


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _on_meta(config: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model
