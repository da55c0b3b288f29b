"""Families that vLLM has a model for, what it needs of their sizes, and what published config.json files say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

__all__ = ["ADAPTED", "NOT_HERE", "PUBLISHED", "SHARED"]

SHARED = (
    "afmoe", "cohere2moe", "cohere2moe-mean", "deepseek2", "deepseek2-groups", "deepseek3", "ernie4_5-moe",
    "exaone-moe", "gemma4", "glm4-moe-lite", "glm4moe", "gpt-oss", "granitehybrid", "granitemoe", "granitemoeshared",
    "hunyuan-moe", "hy_v3", "kimi-k2", "lfm2moe", "llama4", "mixtral", "olmoe", "qwen2moe", "qwen3moe", "solar-open",
)  # fmt: skip
"""Those whose stock model runs in vLLM's CPU build: tokens are compared."""
_GROUPS = "its CPU build routes by no sigmoid with a bias and without groups"
_UNGATED = "its CPU build has no experts without a gate"
_SPARSE = "its CPU build has no sparse attention"
_SEES = "its model also sees, and wants a torchvision that goes with no CPU build of torch here"
_HALF = "its CPU build has linear attention for bfloat16 and kernels of newer CPUs alone"
_NONE = "it has no model of it"
_NEWER = "the Transformers that it is installed with has no configuration of it"
NOT_HERE: dict[str, str] = {
    "laguna": _GROUPS, "laguna-m": _GROUPS, "minimax-m2": _GROUPS, "nemotron": _UNGATED, "nemotron-latent": _UNGATED,
    "deepseek32": _SPARSE, "glm-dsa": _SPARSE, "deepseek4": _NEWER, "qwen35moe": _SEES, "qwen35moe-fused": _SEES,
    "qwen3vlmoe": _SEES, "qwen4exp": _SEES, "qwen3next": _HALF,
    "kimi-linear": "its CPU build cannot import the kernels",
    "mimo2": "its CPU build has no attention with keys and values of different widths",
    "mellum": "its model fails on the configuration that Transformers writes",
    "dots1": _NONE, "minimax-m3": _NONE, "bailingmoe3": _NEWER, "sarvam-moe": _NEWER, "ling-2": _NEWER,
    "step35": _NEWER,
    "ling-1": "its files are read as Granite's here, whose heads have another width there",
}  # fmt: skip
"""The other families -> why vLLM 0.32's stock model does not run on a CPU, so that there is nothing to compare with."""


def _latent(family: Any) -> Any:
    """The one width that its latent attention has kernels for."""
    widths = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64}
    return replace(family, values=family.values | widths)


_LATENT = ("deepseek2", "deepseek2-groups", "deepseek3", "glm4-moe-lite", "kimi-k2")
ADAPTED: dict[str, Callable[[Any], Any]] = dict.fromkeys(_LATENT, _latent)
_BIASED = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
PUBLISHED: dict[str, dict[str, Any]] = {
    "deepseek2": {"n_group": 1, "topk_group": 1},
    "deepseek3": _BIASED,
    "kimi-k2": _BIASED,
    "glm4-moe-lite": _BIASED,
    "afmoe": {"n_group": 1, "topk_group": 1},
    "hy_v3": {"first_k_dense_replace": 1, "expert_hidden_dim": 256, "route_norm": True, "qk_norm": True},
}
"""What published files say and Transformers does not write: the stock model cannot do without."""
