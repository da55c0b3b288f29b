"""Every model family once: a small configuration in Transformers' own words, and the random model made from it.

No mapping of the package takes part: the models are saved as Hugging Face checkpoints and converted by
llama.cpp's published converter.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerFast

from .published import deepseek4_as_published, in_mxfp4, kimi_linear_as_published

__all__ = ["FAMILIES", "QUICK", "Family", "random_model", "save_checkpoint"]

SPECIALS = ["<|end|>", "<|user|>", "<|assistant|>", "<|pad|>"]
MERGED = ("t", "h")
VOCAB = 257 + len(SPECIALS)

_DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "bos_token_id": None,
    "eos_token_id": 257,
    "pad_token_id": 260,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
_NUM_EXPERTS = {"num_experts": 8, "moe_intermediate_size": 256, "intermediate_size": 512}
_LOCAL_EXPERTS = {"num_local_experts": 8, "intermediate_size": 256}
_SHARED = {"shared_expert_intermediate_size": 512}
_ROUTED = {
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "moe_intermediate_size": 256,
    "intermediate_size": 512,
    "first_k_dense_replace": 1,
}
_LATENT = _ROUTED | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
_HYBRID = {
    "num_hidden_layers": 4,
    "head_dim": 64,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "full_attention_interval": 4,
}
_WINDOWS = {
    "num_hidden_layers": 5,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"],
}
_TWO_BASES = {
    "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
}
_INDEXED = {"index_topk": 16, "index_head_dim": 64, "index_n_heads": 16}  # few would often be alike, at nothing
_DEEPSEEK4 = {
    "num_key_value_heads": 1,
    "head_dim": 64,
    "moe_intermediate_size": 256,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "q_lora_rank": 64,
    "layer_types": [
        "sliding_attention",
        "compressed_sparse_attention",
        "heavily_compressed_attention",
        "compressed_sparse_attention",
        "sliding_attention",
    ],
    "mlp_layer_types": ["hash_moe"] + ["moe"] * 4,
    "partial_rotary_factor": 0.5,
    "rope_parameters": _YARN,
    "sliding_window": 16,
    "o_groups": 2,
    "o_lora_rank": 32,
    "index_n_heads": 16,
    "index_head_dim": 128,  # as wide as heads, llama.cpp divides by nothing
    "index_topk": 3,
    "hc_mult": 4,
    "swiglu_limit": 1.0,
}
_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 256,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}


_STATE_SPACES = {
    "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
    "head_dim": 64,
    "n_routed_experts": 8,
    "moe_intermediate_size": 256,
    "moe_shared_expert_intermediate_size": 512,
    "mamba_num_heads": 8,
    "mamba_head_dim": 32,
    "ssm_state_size": 16,
    "n_groups": 2,
    "expand": 1,
    "routed_scaling_factor": 1.5,
    "layer_norm_epsilon": 1e-6,
}


@dataclass(frozen=True)
class Family:
    """`values` configure the model; `written` are keys of the saved config.json that Transformers does not write.

    `stored` gives what released checkpoints have instead of the tensors as Transformers writes them.
    """

    model_type: str
    values: dict[str, Any]
    written: dict[str, Any]
    stored: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None


def _family(
    model_type: str, *parts: dict[str, Any], written: dict[str, Any] | None = None, stored: Any = None, **values: Any
) -> Family:
    merged: dict[str, Any] = dict(_DECODER)
    for part in parts:
        merged |= part
    return Family(model_type, merged | values, written or {}, stored)


_SIGMOID = {"scoring_func": "sigmoid"}
_BAILING = {  # what such a config.json calls these
    "model_type": "bailing_moe_v2",
    "architectures": ["BailingMoeV2ForCausalLM"],
    "num_experts": 8,
    "num_shared_experts": 1,
    "score_function": "sigmoid",
}
FAMILIES: dict[str, Family] = {
    "qwen3moe": _family("qwen3_moe", _NUM_EXPERTS, head_dim=64, norm_topk_prob=True),
    "qwen2moe": _family("qwen2_moe", _NUM_EXPERTS, _SHARED, norm_topk_prob=False),
    "qwen3next": _family("qwen3_next", _NUM_EXPERTS, _SHARED, _HYBRID, norm_topk_prob=True),
    "qwen35moe": _family("qwen3_5_moe_text", _NUM_EXPERTS, _SHARED, _HYBRID),
    "qwen35moe-fused": _family("qwen3_5_moe_text", _NUM_EXPERTS, _SHARED, _HYBRID, written={"fuse_gate_up": True}),
    "qwen4exp": _family(
        "qwen4_exp_text", _NUM_EXPERTS, _SHARED, _HYBRID, hc_count=4, hc_lowrank=32, ple_layer_ids=[2],
        ple_embed_dim=256, ngram_vocab_size_base=500, split_ngram_parts=4, heads_per_ngram=4, indexer_n_heads=16,
        indexer_kv_heads=1, indexer_head_dim=64, indexer_budget=8, indexer_compress_ratio=4, norm_topk_prob=True,
        output_gate_type="sigmoid",
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    ),
    "qwen3vlmoe": Family(
        "qwen3_vl_moe",
        {
            "text_config": _DECODER | _NUM_EXPERTS | {
                "head_dim": 64,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [12, 10, 10]},
            },
            "vision_config": _VISION,
            "tie_word_embeddings": False,
        },
        {"eos_token_id": 257, "pad_token_id": 260},
        lambda tensors: {
            key: value.transpose(1, 2) if ".mlp.experts." in key else value for key, value in tensors.items()
        },
    ),
    "llama4": _family(
        "llama4_text", _LOCAL_EXPERTS, num_hidden_layers=5, num_experts_per_tok=1, head_dim=64,
        intermediate_size_mlp=512, interleave_moe_layer_step=2,
    ),
    "mixtral": _family("mixtral", _LOCAL_EXPERTS),
    "olmoe": _family("olmoe", _NUM_EXPERTS, intermediate_size=256, num_key_value_heads=4, rms_norm_eps=1e-5),
    "granitemoe": _family(
        "granitemoe",
        _LOCAL_EXPERTS,
        embedding_multiplier=3.0,
        attention_multiplier=0.2,
        residual_multiplier=0.7,
        logits_scaling=2.0,
    ),
    "gemma4": _family(
        "gemma4_text", num_hidden_layers=6, head_dim=32, global_head_dim=64, num_global_key_value_heads=1,
        num_experts=8, top_k_experts=2, moe_intermediate_size=256, intermediate_size=512, enable_moe_block=True,
        hidden_size_per_layer_input=0, attention_k_eq_v=True, sliding_window=32, final_logit_softcapping=20.0,
        tie_word_embeddings=True, rope_parameters=None,
    ),
    "nemotron": _family("nemotron_h", _STATE_SPACES),
    "nemotron-latent": _family("nemotron_h", _STATE_SPACES, moe_latent_size=128),
    "gpt-oss": _family(
        "gpt_oss", _LOCAL_EXPERTS, num_hidden_layers=4, head_dim=64, sliding_window=32,
        rope_parameters=_YARN | {"truncate": False}, rms_norm_eps=1e-5,
    ),
    "granitehybrid": _family(
        "granitemoehybrid",
        _LOCAL_EXPERTS,
        num_hidden_layers=4,
        layer_types=["linear_attention", "full_attention", "linear_attention", "linear_attention"],
        shared_intermediate_size=512,
        mamba_n_heads=8,
        mamba_d_head=64,
        mamba_d_state=16,
        position_embedding_type="nope",
        embedding_multiplier=3.0,
        attention_multiplier=0.2,
        residual_multiplier=0.7,
        logits_scaling=2.0,
        written={"layer_types": ["mamba", "attention", "mamba", "mamba"]},
    ),
    "granitemoeshared": _family(
        "granitemoeshared",
        _LOCAL_EXPERTS,
        shared_intermediate_size=512,
        embedding_multiplier=3.0,
        attention_multiplier=0.2,
        residual_multiplier=0.7,
        logits_scaling=2.0,
    ),
    "ling-1": _family(  # Granite without factors
        "granitemoeshared", _LOCAL_EXPERTS, head_dim=48, shared_intermediate_size=512, embedding_multiplier=1.0,
        attention_multiplier=48**-0.5, residual_multiplier=1.0, logits_scaling=1.0,
        written={
            "architectures": ["BailingMoeForCausalLM"], "moe_intermediate_size": 256, "num_shared_experts": 2,
            "norm_topk_prob": True, "first_k_dense_replace": 0,
        },
    ),
    "minimax-m2": _family("minimax_m2", _LOCAL_EXPERTS, head_dim=64, partial_rotary_factor=0.5,
                          written={"rotary_dim": 32} | _SIGMOID),
    "minimax-m3": _family(
        "minimax_m3_vl_text", _LOCAL_EXPERTS, head_dim=64, partial_rotary_factor=0.5, rotary_dim=32,
        dense_intermediate_size=512, shared_intermediate_size=256, routed_scaling_factor=2.0, index_n_heads=2,
        index_head_dim=64, index_block_size=8, index_topk_blocks=3, index_local_blocks=1,
        mlp_layer_types=["dense", "sparse", "sparse"],
        layer_types=["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
        written=_SIGMOID | {
            "architectures": ["MiniMaxM3SparseForCausalLM"], "n_shared_experts": 1, "moe_layer_freq": [0, 1, 1],
            "sparse_attention_config": {
                "sparse_num_index_heads": 2, "sparse_index_dim": 64, "sparse_topk_blocks": 3, "sparse_block_size": 8,
                "sparse_local_block": 1, "sparse_attention_freq": [0, 1, 1],
            },
        },
    ),
    "ernie4_5-moe": _family(
        "ernie4_5_moe",
        moe_num_experts=8,
        moe_k=2,
        moe_intermediate_size=256,
        moe_num_shared_experts=1,
        moe_layer_start_index=1,
        intermediate_size=512,
    ),
    "glm4moe": _family(
        "glm4_moe", _ROUTED, head_dim=64, partial_rotary_factor=0.5, routed_scaling_factor=1.5, norm_topk_prob=True,
        attention_bias=True, use_qk_norm=True,
    ),
    "deepseek2": _family("deepseek_v2", _LATENT, q_lora_rank=None, topk_method="greedy", routed_scaling_factor=1.0,
                         norm_topk_prob=False),
    "deepseek2-groups": _family(
        "deepseek_v2", _LATENT, q_lora_rank=64, topk_method="group_limited_greedy", n_group=4, topk_group=2,
        routed_scaling_factor=2.0, norm_topk_prob=False,
        rope_parameters=_YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    ),
    "deepseek3": _family(
        "deepseek_v3", _LATENT, q_lora_rank=64, n_group=4, topk_group=2, routed_scaling_factor=1.5, norm_topk_prob=True,
        rope_parameters=_YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}, written=_SIGMOID,
    ),
    "glm4-moe-lite": _family(  # GLM-4.7-Flash
        "glm4_moe_lite", _LATENT, q_lora_rank=64, n_group=1, topk_group=1, routed_scaling_factor=1.8,
        norm_topk_prob=True, written=_SIGMOID,
    ),
    "solar-open": _family(
        "solar_open", _ROUTED, head_dim=64, first_k_dense_replace=0, partial_rotary_factor=1.0,
        routed_scaling_factor=1.5, norm_topk_prob=True,
    ),
    "dots1": _family("dots1", _ROUTED, num_key_value_heads=4, routed_scaling_factor=2.5, norm_topk_prob=True,
                     written=_SIGMOID),
    "sarvam-moe": _family(
        "sarvam_moe", _ROUTED, head_dim=64, routed_scaling_factor=2.5, norm_topk_prob=True,
        written=_BAILING | {"architectures": ["SarvamMoEForCausalLM"]},
    ),
    "ling-2": _family(  # GLM-4.5 with groups
        "sarvam_moe", _ROUTED, head_dim=64, partial_rotary_factor=0.5, n_group=4, topk_group=2,
        routed_scaling_factor=2.5, norm_topk_prob=True, written=_BAILING,
    ),
    "hunyuan-moe": _family(
        "hunyuan_v1_moe", head_dim=64, num_experts=8, moe_topk=2, intermediate_size=256,
        written={"moe_topk": [2] * 3, "moe_intermediate_size": [256] * 3, "num_shared_expert": [1] * 3},
    ),
    "hy_v3": _family("hy_v3", _NUM_EXPERTS, head_dim=64, num_shared_experts=1, router_scaling_factor=2.8),
    "exaone-moe": _family(
        "exaone_moe", _NUM_EXPERTS, _WINDOWS, head_dim=64, num_shared_experts=1, n_group=1, topk_group=1,
        routed_scaling_factor=2.5, norm_topk_prob=True, first_k_dense_replace=1, written=_SIGMOID,
    ),
    **{
        name: _family(
            "cohere2_moe", _WINDOWS, num_experts=8, intermediate_size=256, prefix_dense_intermediate_size=512,
            num_shared_experts=2, head_dim=64, first_k_dense_replace=1, expert_selection_fn="sigmoid",
            norm_topk_prob=normalises, logit_scale=0.5, layer_types=layers,
            layer_norm_eps=1e-5, rms_norm_eps=rms,
        )
        for name, normalises, rms, layers in (
            ("cohere2moe", True, 1e-6, ["full_attention"] + ["sliding_attention"] * 3 + ["full_attention"]),
            ("cohere2moe-mean", False, None, ["sliding_attention"] * 3 + ["full_attention", "sliding_attention"]),
        )
    },
    "mellum": _family(  # in the order that llama.cpp knows, whatever a file says
        "mellum", _NUM_EXPERTS, _WINDOWS, head_dim=64, rope_parameters=_TWO_BASES,
        layer_types=["sliding_attention"] * 3 + ["full_attention", "sliding_attention"],
    ),
    "deepseek32": _family(
        "deepseek_v32", _LATENT, _INDEXED, q_lora_rank=64, n_group=4, topk_group=2, routed_scaling_factor=1.5,
        norm_topk_prob=True, rope_parameters=_YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
        written=_SIGMOID | {"first_k_dense_replace": 1},
    ),
    "deepseek4": _family(
        "deepseek_v4", _DEEPSEEK4, num_hidden_layers=5, stored=deepseek4_as_published,
        written={"compress_ratios": [0, 4, 128, 4, 0], "num_hash_layers": 1, "qk_rope_head_dim": 32,
                 "rope_theta": 10000.0, "rope_scaling": _YARN | {"type": "yarn"}},
    ),
    "glm-dsa": _family(
        "glm_moe_dsa", _LATENT, _INDEXED, num_hidden_layers=4, q_lora_rank=64, n_group=1, topk_group=1,
        routed_scaling_factor=2.5, norm_topk_prob=True, indexer_types=["full", "full", "shared", "full"],
        written=_SIGMOID | {"first_k_dense_replace": 1},
    ),
    "afmoe": _family(  # four layers a period, as its files do not say
        "afmoe", _NUM_EXPERTS, num_hidden_layers=5, head_dim=64, num_shared_experts=1, num_dense_layers=1,
        route_scale=2.5, sliding_window=8, global_attn_every_n_layers=4, mup_enabled=True,
        written={"score_func": "sigmoid", "route_norm": True},
    ),
    "mimo2": _family(
        "mimo_v2_flash", _ROUTED, num_hidden_layers=4, num_attention_heads=8, head_dim=48, v_head_dim=32,
        layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"], sliding_window=8,
        mlp_layer_types=["dense", "sparse", "sparse", "sparse"], attention_value_scale=0.707,
        norm_topk_prob=True, n_group=1, topk_group=1,
        rope_parameters={
            kind: values | {"partial_rotary_factor": 0.34} for kind, values in _TWO_BASES.items()
        },
        written=_SIGMOID | {
            "swa_head_dim": 48, "swa_num_attention_heads": 8, "swa_v_head_dim": 32, "topk_method": "noaux_tc",
            "swa_num_key_value_heads": 4, "hybrid_layer_pattern": [0, 1, 1, 0], "partial_rotary_factor": 0.34,
            "layernorm_epsilon": 1e-6,
        },
    ),
    "kimi-linear": _family(
        "kimi_linear", num_hidden_layers=4, num_key_value_heads=4, num_local_experts=8, n_shared_experts=1,
        moe_intermediate_size=256, intermediate_size=512, kv_lora_rank=64, q_lora_rank=None, qk_rope_head_dim=16,
        qk_nope_head_dim=32, v_head_dim=32, linear_head_dim=32, linear_num_heads=4, routed_scaling_factor=2.446,
        norm_topk_prob=True, n_group=1, topk_group=1, mlp_layer_types=["dense"] + ["sparse"] * 3,
        layer_types=["linear_attention"] * 2 + ["full_attention", "linear_attention"], rope_parameters=None,
        stored=kimi_linear_as_published,
        written=_SIGMOID | {
            "num_shared_experts": 1, "first_k_dense_replace": 1,
            "linear_attn_config": {
                "head_dim": 32, "num_heads": 4, "short_conv_kernel_size": 4, "full_attn_layers": [3],
                "kda_layers": [1, 2, 4],
            },
        },
    ),
    "bailingmoe3": _family(
        "bailing_hybrid", num_hidden_layers=4, num_key_value_heads=4, num_local_experts=8, n_shared_experts=1,
        moe_intermediate_size=256, intermediate_size=512, kv_lora_rank=64, q_lora_rank=None, qk_rope_head_dim=16,
        qk_nope_head_dim=32, v_head_dim=32, head_dim=32, n_group=4, topk_group=2, routed_scaling_factor=2.5,
        norm_topk_prob=True, first_k_dense_replace=1, layer_group_size=3, kda_lower_bound=-2.0,
        layer_types=["linear_attention"] * 2 + ["full_attention"] * 2,
        written=_SIGMOID | {
            "architectures": ["BailingMoeV3ForCausalLM"], "no_kda_lora": True, "score_function": "sigmoid",
            "gated_attention_proj_granularity_type": "head_wise", "num_experts": 8, "num_shared_experts": 1,
            "moe_shared_expert_intermediate_size": 256, "num_nextn_predict_layers": 0, "norm_topk_prob": True,
            "n_group": 4, "topk_group": 2, "head_dim": 32,
        },
    ),
    "step35": Family(
        "step3p7",
        {
            "text_config": _DECODER | _ROUTED | {
                "num_hidden_layers": 5, "head_dim": 64, "share_expert_dim": 256, "sliding_window": 8,
                "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "sliding_attention",
                                "full_attention"],
                "mlp_layer_types": ["dense"] + ["sparse"] * 4, "num_sliding_attention_heads": 6,
                "moe_router_scaling_factor": 1.5, "swiglu_limits": [0.0, 0.0, 0.0, 0.5, 0.75],
                "swiglu_limits_shared": [0.0, 0.0, 0.0, 0.0, 0.625],
                "rope_parameters": {
                    "full_attention": {
                        "rope_type": "llama3", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "factor": 2.0,
                        "low_freq_factor": 1.0, "high_freq_factor": 1.2, "original_max_position_embeddings": 50,
                    },
                    "sliding_attention": {
                        "rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 1.0,
                    },
                },
            },
            "vision_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 1.0},
            "tie_word_embeddings": False,
        },
        {
            "eos_token_id": 257, "pad_token_id": 260, "num_attention_groups": 2, "moe_num_experts": 8, "moe_top_k": 2,
            "attention_other_setting": {"num_attention_heads": 6, "num_attention_groups": 2},
            "rope_theta": [10000.0, 5000.0, 5000.0, 5000.0, 10000.0], "norm_expert_weight": True,
            "partial_rotary_factors": [0.5, 1.0, 1.0, 1.0, 0.5], "moe_layers_enum": "1,2,3,4",
        } | _SIGMOID,
    ),
    "lfm2moe": _family(
        "lfm2_moe", _NUM_EXPERTS, num_hidden_layers=4, num_dense_layers=1, norm_eps=1e-6, tie_word_embeddings=True,
        layer_types=["conv", "full_attention", "conv", "full_attention"],
    ),
    **{
        name: _family(
            "laguna", _NUM_EXPERTS, num_hidden_layers=5, head_dim=64, sliding_window=8, gating=gating,
            layer_types=["full_attention"] + ["sliding_attention"] * 3 + ["full_attention"],
            num_attention_heads_per_layer=[4, 8, 8, 8, 4], shared_expert_intermediate_size=256,
            moe_routed_scaling_factor=2.0,
            rope_parameters={
                kind: values | {"partial_rotary_factor": 0.5 if kind == "full_attention" else 1.0}
                for kind, values in _TWO_BASES.items()
            },
        )
        for name, gating in (("laguna", True), ("laguna-m", "per-element"))
    },
    "kimi-k2": _family(  # DeepSeek-V3 without groups
        "deepseek_v3", _LATENT, q_lora_rank=64, n_group=1, topk_group=1, routed_scaling_factor=2.827,
        norm_topk_prob=True, rope_parameters=_YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}, written=_SIGMOID,
    ),
}  # fmt: skip


QUICK = {
    "qwen3moe", "mixtral", "granitemoe", "minimax-m2", "ernie4_5-moe", "glm4moe", "deepseek2", "deepseek3", "gpt-oss",
    "gemma4", "nemotron", "exaone-moe",
}  # fmt: skip
"""Of each kind one, for what takes seconds a family; the slow tests have all."""


def random_model(name: str) -> torch.nn.Module:
    """Return the family's stock model in float32, every parameter random enough to matter."""
    family = FAMILIES[name]
    config = AutoConfig.for_model(family.model_type, **copy.deepcopy(family.values))  # it writes into nested ones
    torch.manual_seed(0)
    sees = "vision_config" in family.values
    model = (AutoModelForImageTextToText if sees else AutoModelForCausalLM).from_config(config).float()
    generator = torch.Generator().manual_seed(1)
    for key, value in (*model.named_parameters(), *model.named_buffers()):
        if key.endswith("tid2eid"):
            value.copy_(torch.rand(len(value), 8, generator=generator).argsort(-1)[:, : value.shape[1]])
        if not value.is_floating_point():
            continue
        noise = torch.randn(value.shape, generator=generator)
        if "embed_tokens.weight" in key:
            value.data = noise
        elif value.ndim >= 2 and "e_score" not in key:
            value.data = noise * value.shape[-1] ** -0.5
        elif "inv_freq" not in key and "embed_scale" not in key:
            value.data = value.data + 0.15 * noise
    if name == "deepseek4":
        for key, value in model.named_parameters():
            if ".mlp.experts." in key:
                value.data = in_mxfp4(value)[2]
    return model.eval()


def save_checkpoint(name: str, model: torch.nn.Module, folder: Path) -> Path:
    """Write the model as a Hugging Face directory (safetensors, config, tokenizer) and return it."""
    model.save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | FAMILIES[name].written))
    _tokenizer().save_pretrained(folder)
    stored = FAMILIES[name].stored
    if stored is not None:
        weights = folder / "model.safetensors"
        tensors = {key: value.contiguous() for key, value in stored(load_file(weights)).items()}
        save_file(tensors, weights, metadata={"format": "pt"})
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "".join(MERGED)]
    backend = Tokenizer(models.BPE(vocab={token: at for at, token in enumerate(tokens)}, merges=[MERGED]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=SPECIALS[0], pad_token=SPECIALS[3])
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIALS})
    assert len(tokenizer) == VOCAB
    return tokenizer
