"""The stock Transformers model for a generated shape, configured and loaded without any of the package's mapping."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Ernie4_5_MoeConfig,
    Ernie4_5_MoeForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    MiniMaxM2Config,
    MiniMaxM2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)
from transformers.models.qwen3_5_moe import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

from tests.support.generated_metadata import GRANITE
from tests.support.generated_model import GeneratedModel, Shape

__all__ = ["greedy", "logits_of", "stock_model"]


def stock_model(model: GeneratedModel) -> torch.nn.Module:
    stock = _BUILD[model.shape.architecture](model.shape).to(torch.float32)
    stock.load_state_dict(model.state, strict=True)
    return stock.eval()


def _decoder(shape: Shape) -> dict[str, Any]:
    """What every family with grouped-query attention calls alike."""
    return {
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "num_experts_per_tok": shape.top_k,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": shape.context,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }


def _qwen3moe(shape: Shape) -> torch.nn.Module:
    config = Qwen3MoeConfig(
        **_decoder(shape),
        head_dim=shape.head_dim,
        moe_intermediate_size=shape.inter,
        num_experts=shape.experts,
        norm_topk_prob=True,
    )
    return Qwen3MoeForCausalLM(config)


def _qwen2moe(shape: Shape) -> torch.nn.Module:
    config = Qwen2MoeConfig(
        **_decoder(shape),
        moe_intermediate_size=shape.inter,
        shared_expert_intermediate_size=shape.inter * shape.shared_experts,
        num_experts=shape.experts,
        norm_topk_prob=False,
        qkv_bias=True,
    )
    return Qwen2MoeForCausalLM(config)


def _mixtral(shape: Shape) -> torch.nn.Module:
    return MixtralForCausalLM(
        MixtralConfig(**_decoder(shape), intermediate_size=shape.inter, num_local_experts=shape.experts)
    )


def _olmoe(shape: Shape) -> torch.nn.Module:
    return OlmoeForCausalLM(
        OlmoeConfig(
            **_decoder(shape),
            intermediate_size=shape.inter,
            num_experts=shape.experts,
            norm_topk_prob=False,
            pad_token_id=None,
            eos_token_id=None,
        )
    )


def _glm4moe(shape: Shape) -> torch.nn.Module:
    config = Glm4MoeConfig(
        **_decoder(shape),
        head_dim=shape.head_dim,
        partial_rotary_factor=shape.rope_dim / shape.head_dim,
        intermediate_size=shape.dense_inter,
        moe_intermediate_size=shape.inter,
        n_routed_experts=shape.experts,
        n_shared_experts=shape.shared_experts,
        first_k_dense_replace=shape.dense_layers,
        routed_scaling_factor=1.5,
        norm_topk_prob=True,
        attention_bias=True,
        use_qk_norm=shape.qk_norm,
    )
    return Glm4MoeForCausalLM(config)


def _deepseek2(shape: Shape) -> torch.nn.Module:
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": 10000.0}
    if shape.yarn_factor:
        rope |= {"rope_type": "yarn", "factor": shape.yarn_factor, "mscale": 0.707, "mscale_all_dim": 0.707}
        rope |= {"original_max_position_embeddings": shape.context, "beta_fast": 32.0, "beta_slow": 1.0}
    common: dict[str, Any] = _decoder(shape) | {
        "num_key_value_heads": shape.heads,
        "intermediate_size": shape.dense_inter,
        "moe_intermediate_size": shape.inter,
        "n_routed_experts": shape.experts,
        "n_shared_experts": shape.shared_experts,
        "first_k_dense_replace": shape.dense_layers,
        "kv_lora_rank": shape.kv_lora_rank,
        "q_lora_rank": shape.q_lora_rank or None,
        "qk_rope_head_dim": shape.rope_dim,
        "qk_nope_head_dim": shape.head_dim,
        "v_head_dim": shape.head_dim,
        "rope_parameters": rope,
    }
    if not shape.sigmoid:
        return DeepseekV2ForCausalLM(DeepseekV2Config(**common, topk_method="greedy", routed_scaling_factor=1.0))
    routing = {"n_group": shape.groups, "topk_group": shape.used_groups, "norm_topk_prob": True}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**common, **routing, routed_scaling_factor=1.5))


def _linear(shape: Shape) -> dict[str, Any]:
    """The hybrids' linear attention, their shared expert, and how often full attention comes."""
    return {
        "head_dim": shape.head_dim,
        "partial_rotary_factor": shape.rope_dim / shape.head_dim,
        "moe_intermediate_size": shape.inter,
        "shared_expert_intermediate_size": shape.inter * shape.shared_experts,
        "num_experts": shape.experts,
        "linear_key_head_dim": shape.head_dim // 2,
        "linear_value_head_dim": shape.head_dim // 2,
        "linear_num_key_heads": shape.linear_heads[0],
        "linear_num_value_heads": shape.linear_heads[1],
        "full_attention_interval": shape.full_attention_interval,
    }


def _qwen3next(shape: Shape) -> torch.nn.Module:
    return Qwen3NextForCausalLM(Qwen3NextConfig(**_decoder(shape), **_linear(shape), norm_topk_prob=True))


def _qwen35moe(shape: Shape) -> torch.nn.Module:
    return Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**_decoder(shape), **_linear(shape)))


def _granitemoe(shape: Shape) -> torch.nn.Module:
    return GraniteMoeForCausalLM(
        GraniteMoeConfig(**_decoder(shape), **GRANITE, intermediate_size=shape.inter, num_local_experts=shape.experts)
    )


def _minimax(shape: Shape) -> torch.nn.Module:
    config = MiniMaxM2Config(
        **_decoder(shape),
        head_dim=shape.head_dim,
        partial_rotary_factor=shape.rope_dim / shape.head_dim,
        intermediate_size=shape.inter,
        num_local_experts=shape.experts,
    )
    return MiniMaxM2ForCausalLM(config)


def _ernie(shape: Shape) -> torch.nn.Module:
    values = _decoder(shape)
    config = Ernie4_5_MoeConfig(
        **{name: value for name, value in values.items() if name != "num_experts_per_tok"},
        moe_k=shape.top_k,
        moe_num_experts=shape.experts,
        moe_intermediate_size=shape.inter,
        moe_num_shared_experts=shape.shared_experts,
        moe_layer_start_index=shape.dense_layers,
        intermediate_size=shape.dense_inter,
        tie_word_embeddings=False,
    )
    return Ernie4_5_MoeForCausalLM(config)


_BUILD = {
    "qwen3moe": _qwen3moe,
    "qwen2moe": _qwen2moe,
    "llama": _mixtral,
    "olmoe": _olmoe,
    "glm4moe": _glm4moe,
    "deepseek2": _deepseek2,
    "qwen3next": _qwen3next,
    "qwen35moe": _qwen35moe,
    "granitemoe": _granitemoe,
    "minimax-m2": _minimax,
    "ernie4_5-moe": _ernie,
}


@torch.inference_mode()
def logits_of(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """`[num_tokens, vocab]`, the whole prompt in one forward pass."""
    return model(torch.tensor([ids])).logits[0].float()


@torch.inference_mode()
def greedy(model: torch.nn.Module, prompt: list[int], num_tokens: int) -> tuple[list[int], torch.Tensor]:
    """Decode with a cache; the tokens, and the logits each was chosen from `[num_tokens, vocab]`."""
    from transformers import DynamicCache

    cache, ids, rows = DynamicCache(config=model.config), prompt, []
    tokens: list[int] = []
    for _ in range(num_tokens):
        rows.append(model(torch.tensor([ids]), past_key_values=cache, use_cache=True).logits[0, -1].float())
        tokens.append(int(rows[-1].argmax()))
        ids = tokens[-1:]
    return tokens, torch.stack(rows)
