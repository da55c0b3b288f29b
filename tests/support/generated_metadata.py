"""The shape of a generated model, and the metadata that a converter would write for it."""

from __future__ import annotations

from dataclasses import dataclass

from gguf import ExpertGatingFuncType, GGMLQuantizationType, GGUFWriter

from tests.support.vocabularies import WrittenVocabulary

__all__ = ["GRANITE", "LINEAR_KERNEL", "Shape", "write_metadata"]

Type = GGMLQuantizationType
_SPECIALS = ["<|end|>", "<|user|>", "<|assistant|>", "<|pad|>"]
_MERGED = ["th"]
LINEAR_KERNEL = 4
"""Tokens that the convolution in front of linear attention sees."""
GRANITE = {
    "attention_multiplier": 0.2,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.7,
    "logits_scaling": 2.0,
}
_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Dimensions of a generated model; `types` are the gate, up and down experts' GGUF types."""

    architecture: str = "qwen3moe"
    layers: int = 2
    hidden: int = 256
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    experts: int = 8
    top_k: int = 2
    inter: int = 256
    dense_inter: int = 512
    dense_layers: int = 1
    shared_experts: int = 1
    kv_lora_rank: int = 64
    q_lora_rank: int = 0
    rope_dim: int = 16
    context: int = 512
    types: tuple[Type, Type, Type] = (Type.Q8_0, Type.Q8_0, Type.Q8_0)
    dense_type: Type = Type.F32
    split_kv_b: bool = True
    yarn_factor: float = 0.0
    sigmoid: bool = False
    """Of deepseek2 alone: route as DeepSeek-V3 does, by sigmoid with a correction, within groups of experts."""
    groups: int = 4
    used_groups: int = 2
    qk_norm: bool = False
    """Of glm4moe alone, whose members differ in it."""
    expert_tensors: bool = False
    """One tensor per expert, as Mixtral files had before April 2024."""
    linear_heads: tuple[int, int] = (2, 4)
    """Of the hybrids alone: key heads and value heads of linear attention, `head_dim // 2` wide each."""
    full_attention_interval: int = 4
    unused_tokens: int = 0
    """That no text is split into: how a vocabulary gets a released model's size."""
    vocabulary: WrittenVocabulary | None = None
    """Instead of the smallest one that can spell any text."""
    seed: int = 0

    @property
    def vocab(self) -> int:
        if self.vocabulary is not None:
            return len(self.vocabulary.tokens)
        return 256 + len(_SPECIALS) + len(_MERGED) + self.unused_tokens


def write_metadata(writer: GGUFWriter, shape: Shape) -> None:
    """Add every key of a generated model: dimensions, the family's own keys, tokenizer and chat template."""
    writer.add_name(f"generated-{shape.architecture}")
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_head_count(shape.heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_expert_count(shape.experts)
    writer.add_expert_used_count(shape.top_k)
    writer.add_vocab_size(shape.vocab)
    _FAMILIES[shape.architecture](writer, shape)
    if shape.vocabulary is None:
        _tokenizer(writer, shape.unused_tokens)
    else:
        shape.vocabulary.write(writer)


def _qwen3moe_metadata(writer: GGUFWriter, shape: Shape) -> None:
    writer.add_feed_forward_length(shape.dense_inter)
    writer.add_expert_feed_forward_length(shape.inter)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)


def _qwen2moe_metadata(writer: GGUFWriter, shape: Shape) -> None:
    writer.add_feed_forward_length(shape.dense_inter)
    writer.add_expert_feed_forward_length(shape.inter)
    writer.add_expert_shared_feed_forward_length(shape.inter * shape.shared_experts)
    writer.add_head_count_kv(shape.kv_heads)


def _olmoe_metadata(writer: GGUFWriter, shape: Shape) -> None:
    writer.add_feed_forward_length(shape.inter)
    writer.add_head_count_kv(shape.kv_heads)


def _mixtral_metadata(writer: GGUFWriter, shape: Shape) -> None:
    writer.add_feed_forward_length(shape.inter)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.head_dim)


def _glm4moe_metadata(writer: GGUFWriter, shape: Shape) -> None:
    _qwen3moe_metadata(writer, shape)
    writer.add_rope_dimension_count(shape.rope_dim)
    writer.add_leading_dense_block_count(shape.dense_layers)
    writer.add_expert_shared_count(shape.shared_experts)
    _sigmoid_metadata(writer)


def _sigmoid_metadata(writer: GGUFWriter) -> None:
    writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_scale(1.5)
    writer.add_expert_weights_norm(True)


def _deepseek_metadata(writer: GGUFWriter, shape: Shape) -> None:
    writer.add_feed_forward_length(shape.dense_inter)
    writer.add_expert_feed_forward_length(shape.inter)
    absorbed = shape.split_kv_b  # newer files describe the latent cache and store the two halves of kv_b apart
    query = shape.head_dim + shape.rope_dim
    writer.add_head_count_kv(1 if absorbed else shape.heads)
    writer.add_key_length(shape.kv_lora_rank + shape.rope_dim if absorbed else query)
    writer.add_value_length(shape.kv_lora_rank if absorbed else shape.head_dim)
    if absorbed:
        writer.add_key_length_mla(query)
        writer.add_value_length_mla(shape.head_dim)
    if shape.q_lora_rank:
        writer.add_q_lora_rank(shape.q_lora_rank)
    writer.add_kv_lora_rank(shape.kv_lora_rank)
    writer.add_rope_dimension_count(shape.rope_dim)
    writer.add_leading_dense_block_count(shape.dense_layers)
    writer.add_expert_shared_count(shape.shared_experts)
    if shape.sigmoid:
        _sigmoid_metadata(writer)
        writer.add_expert_group_count(shape.groups)
        writer.add_expert_group_used_count(shape.used_groups)
    else:
        writer.add_expert_weights_scale(1.0)
        writer.add_expert_weights_norm(False)
    if shape.yarn_factor:
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(shape.yarn_factor)
        writer.add_rope_scaling_orig_ctx_len(shape.context)
        writer.add_rope_scaling_yarn_log_mul(0.0707)


def _hybrid_metadata(writer: GGUFWriter, shape: Shape) -> None:
    _qwen3moe_metadata(writer, shape)
    writer.add_expert_shared_feed_forward_length(shape.inter * shape.shared_experts)
    writer.add_rope_dimension_count(shape.rope_dim)
    key_heads, value_heads = shape.linear_heads
    writer.add_ssm_conv_kernel(LINEAR_KERNEL)
    writer.add_ssm_state_size(shape.head_dim // 2)
    writer.add_ssm_group_count(key_heads)
    writer.add_ssm_time_step_rank(value_heads)
    writer.add_ssm_inner_size(value_heads * shape.head_dim // 2)
    writer.add_full_attention_interval(shape.full_attention_interval)
    if shape.architecture == "qwen35moe":
        writer.add_rope_dimension_sections([11, 11, 10, 0])


def _granitemoe_metadata(writer: GGUFWriter, shape: Shape) -> None:
    _mixtral_metadata(writer, shape)
    writer.add_attention_scale(GRANITE["attention_multiplier"])
    writer.add_embedding_scale(GRANITE["embedding_multiplier"])
    writer.add_residual_scale(GRANITE["residual_multiplier"])
    writer.add_logit_scale(GRANITE["logits_scaling"])


def _minimax_metadata(writer: GGUFWriter, shape: Shape) -> None:
    _qwen3moe_metadata(writer, shape)
    writer.add_rope_dimension_count(shape.rope_dim)
    writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)


def _ernie_metadata(writer: GGUFWriter, shape: Shape) -> None:
    writer.add_feed_forward_length(shape.dense_inter)
    writer.add_expert_feed_forward_length(shape.inter)
    writer.add_expert_shared_feed_forward_length(shape.inter * shape.shared_experts)
    writer.add_expert_shared_count(shape.shared_experts)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_leading_dense_block_count(shape.dense_layers)
    writer.add_interleave_moe_layer_step(1)


def _tokenizer(writer: GGUFWriter, num_unused: int) -> None:
    """Every byte, four control tokens and one merge: the smallest vocabulary that can spell any text."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    spelling = bytes_to_unicode()
    tokens = [spelling[byte] for byte in range(256)] + _SPECIALS + _MERGED
    tokens += [f"<|unused {number}|>" for number in range(num_unused)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3] * len(_SPECIALS) + [1] * len(_MERGED) + [5] * num_unused)
    writer.add_token_merges([" ".join(merged) for merged in _MERGED])
    writer.add_eos_token_id(256)
    writer.add_pad_token_id(259)
    writer.add_add_bos_token(False)
    writer.add_chat_template(_TEMPLATE)


_FAMILIES = {
    "qwen3moe": _qwen3moe_metadata,
    "qwen2moe": _qwen2moe_metadata,
    "llama": _mixtral_metadata,
    "olmoe": _olmoe_metadata,
    "glm4moe": _glm4moe_metadata,
    "deepseek2": _deepseek_metadata,
    "qwen3next": _hybrid_metadata,
    "qwen35moe": _hybrid_metadata,
    "granitemoe": _granitemoe_metadata,
    "minimax-m2": _minimax_metadata,
    "ernie4_5-moe": _ernie_metadata,
}
