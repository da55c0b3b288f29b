"""Model families as data: how a GGUF architecture becomes a Transformers configuration and its tensor names.

A family is one entry in `ARCHITECTURES`. Adding one means describing it here, not branching elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
from gguf.tensor_mapping import TensorNameMap

from hybrimoe_kt.errors import ModelError, unknown_name

from .gguf_file import GgufFile

__all__ = ["ARCHITECTURES", "Architecture", "Composed", "Key", "Transform", "architecture_of"]

Key = Callable[..., Any]
"""Reads one metadata value: `key(name, default)`, the name without the architecture prefix."""


@dataclass(frozen=True, slots=True)
class Composed:
    """A parameter assembled from several GGUF tensors (each given dequantised) where its own is absent."""

    parts: tuple[str, ...]
    """GGUF names, `{layer}` standing for the block number."""
    build: Callable[..., torch.Tensor]
    shape: Callable[..., tuple[int, ...]]
    """Result shape from the parts' shapes, to check a file before anything is dequantised."""


@dataclass(frozen=True, slots=True)
class Transform:
    """A parameter that its own GGUF tensor holds in another arrangement."""

    build: Callable[[torch.Tensor, Key], torch.Tensor]
    shape: Callable[[tuple[int, ...]], tuple[int, ...]] = lambda shape: shape
    """Result shape from the tensor's."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """One model family: `keys` maps configuration key -> GGUF key (without the architecture prefix)."""

    gguf: str
    model_type: str
    keys: Mapping[str, str]
    optional_keys: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    present: Mapping[str, str] = field(default_factory=dict)
    """Configuration switches that no key holds -> the tensor whose presence in the file means true."""
    derive: Callable[[Key], Mapping[str, Any]] = lambda key: {}
    """Configuration entries that one key cannot give."""
    composed: Mapping[str, Composed] = field(default_factory=dict)
    """Ending of a parameter's name -> how to assemble it."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Ending of a parameter's name -> GGUF name, where gguf-py's table has none; `{layer}` as above."""
    variant_key: str = ""
    """GGUF key whose value may choose another entry from `variants`."""
    variants: Mapping[Any, Architecture] = field(default_factory=dict)
    float32: tuple[str, ...] = ()
    """Endings of the parameters that stay float32 whatever the model's dtype."""
    transforms: Mapping[str, Transform] = field(default_factory=dict)
    """Ending of a parameter's name -> how to rearrange its tensor."""

    def config(self, file: GgufFile) -> dict[str, Any]:
        """Return the Transformers configuration that the file's metadata describes."""
        key = self.key(file)
        missing = [name for name in ("block_count", *self.keys.values()) if key(name) is None]
        if missing:
            raise ModelError(
                f"{file.path}: metadata key {self.gguf}.{missing[0]} is missing; give --model_path instead"
            )
        config = {ours: key(theirs) for ours, theirs in self.keys.items()}
        config |= {ours: key(theirs) for ours, theirs in self.optional_keys.items() if key(theirs) is not None}
        config |= {ours: name in file.tensors for ours, name in self.present.items()}
        config |= dict(self.constants) | dict(self.derive(key)) | _common(file, key)
        return config | {"model_type": self.model_type}

    def key(self, file: GgufFile) -> Key:
        """Return the reader of this family's metadata in `file`."""
        return lambda name, default=None: file.metadata.get(f"{self.gguf}.{name}", default)

    def name_map(self, num_blocks: int) -> TensorNameMap:
        """gguf-py's table of parameter name -> GGUF name for this family."""
        arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == self.gguf)
        return get_tensor_name_map(arch, num_blocks)


def architecture_of(file: GgufFile) -> Architecture:
    """Return the family of a file; an unsupported one, or one without routed experts, is a ModelError."""
    name = file.architecture
    if name not in ARCHITECTURES:
        message = unknown_name("architecture", name, ARCHITECTURES)
        raise ModelError(f"{file.path}: {message}")
    if not file.metadata.get(f"{name}.expert_count"):
        raise ModelError(
            f"{file.path}: a dense {name} model without experts; this program runs Mixture-of-Experts models"
        )
    family = ARCHITECTURES[name]
    return family.variants.get(family.key(file)(family.variant_key), family)


def _common(file: GgufFile, key: Key) -> dict[str, Any]:
    token = "tokenizer.ggml.{}_token_id".format
    ends = {file.metadata.get(token("eos")), file.metadata.get(token("eot"))} - {None}
    return {
        "vocab_size": file.tensor("token_embd.weight").shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "num_hidden_layers": key("block_count") - key("nextn_predict_layers", 0),
        "bos_token_id": file.metadata.get(token("bos")),
        "eos_token_id": sorted(ends) if len(ends) > 1 else next(iter(ends), None),
        "pad_token_id": file.metadata.get(token("padding")),
        "rope_parameters": _rope(file, key),
    }


def _rope(file: GgufFile, key: Key) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": key("rope.freq_base", 10000.0)}
    kind = key("rope.scaling.type", "none")
    if kind == "none":
        return rope
    if kind not in ("linear", "yarn"):
        raise ModelError(f"{file.path}: position scaling {kind!r} is not supported; valid: none, linear, yarn")
    rope |= {"rope_type": kind, "factor": key("rope.scaling.factor", 1.0)}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = key("rope.scaling.original_context_length")
        rope |= {
            "beta_fast": key("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": key("rope.scaling.yarn_beta_slow", 1.0),
        }
        multiplier = key("rope.scaling.yarn_log_multiplier")
        if multiplier:  # the file stores 0.1 * mscale_all_dim; every released model has mscale equal to it
            mscale = round(multiplier / 0.1, 6)
            rope |= {"mscale": mscale, "mscale_all_dim": mscale}
    return rope


_SOFTMAX, _SIGMOID = 1, 2  # values of the GGUF key expert_gating_func

_DECODER_KEYS = {
    "hidden_size": "embedding_length",
    "num_attention_heads": "attention.head_count",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
}


_BIAS = "mlp.gate.e_score_correction_bias"
_CORRECTION = {_BIAS: "blk.{layer}.exp_probs_b.bias"}
_SHARED_EXPERT_KEYS = {
    "n_routed_experts": "expert_count",
    "intermediate_size": "feed_forward_length",
    "first_k_dense_replace": "leading_dense_block_count",
}


def _glm4moe(key: Key) -> dict[str, Any]:
    if key("expert_gating_func", _SIGMOID) != _SIGMOID:
        raise ModelError("glm4moe with softmax routing is not supported; every released model routes by sigmoid")
    return {
        "partial_rotary_factor": key("rope.dimension_count", key("attention.key_length")) / key("attention.key_length"),
        "routed_scaling_factor": _scale(key),
        "norm_topk_prob": key("expert_weights_norm", True),
    }


def _deepseek2(key: Key) -> dict[str, Any]:
    if key("expert_gating_func", _SOFTMAX) != _SOFTMAX:
        raise ModelError(f"deepseek2 with expert_gating_func {key('expert_gating_func')} is not supported; 1 and 2 are")
    if key("expert_weights_norm", False):
        raise ModelError("deepseek2 with normalised softmax routing weights is not supported by the host's DeepSeek-V2")
    method = "group_limited_greedy" if key("expert_group_count", 1) > 1 else "greedy"
    return _latent(key) | {"topk_method": method}


def _deepseek3(key: Key) -> dict[str, Any]:
    return _latent(key) | {"norm_topk_prob": key("expert_weights_norm", False), "rope_interleave": True}


def _latent(key: Key) -> dict[str, Any]:
    """Dimensions of latent attention, and the groups of experts."""
    rope_dim = key("rope.dimension_count")
    query_dim = key("attention.key_length_mla") or key("attention.key_length")
    return {
        "qk_rope_head_dim": rope_dim,
        "qk_nope_head_dim": query_dim - rope_dim,
        "v_head_dim": key("attention.value_length_mla") or key("attention.value_length"),
        "q_lora_rank": key("attention.q_lora_rank"),
        "num_key_value_heads": key("attention.head_count"),
        "n_group": key("expert_group_count", 1),
        "topk_group": key("expert_group_used_count", 1),
        "routed_scaling_factor": _scale(key),
    }


def _scale(key: Key) -> float:
    """Factor on the routing weights; as in llama.cpp, an absent one and zero mean none."""
    return float(key("expert_weights_scale", 0.0) or 1.0)


def _kv_b(k_b: torch.Tensor, v_b: torch.Tensor) -> torch.Tensor:
    """`attn_k_b [heads, rank, nope]` and `attn_v_b [heads, v, rank]` -> `[heads * (nope + v), rank]`."""
    return torch.cat((k_b.transpose(1, 2), v_b), dim=1).flatten(0, 1)


def _kv_b_shape(k_b: tuple[int, ...], v_b: tuple[int, ...]) -> tuple[int, ...]:
    return (math.prod((k_b[0], k_b[2] + v_b[1])), k_b[1])


_GQA_KEYS = _DECODER_KEYS | {"num_key_value_heads": "attention.head_count_kv", "num_experts": "expert_count"}

_ROW = Transform(build=lambda tensor, key: tensor[None], shape=lambda shape: (1, *shape))
"""A matrix of one row, stored as a vector."""


def _without(keys: Mapping[str, str], name: str) -> dict[str, str]:
    return {ours: theirs for ours, theirs in keys.items() if ours != name}


def _unpermuted(heads: str) -> Transform:
    """Undo the converter's pairing of rotary dimensions; `heads` is the GGUF key of the head count.

    Files of architecture "llama" hold the rows of a head as x0, x64, x1, x65, ... for llama.cpp's rotation of
    neighbours; Transformers rotates the halves x0, x1, ... and x64, x65, ...
    """

    def build(tensor: torch.Tensor, key: Key) -> torch.Tensor:
        return tensor.view(key(heads), -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)

    return Transform(build)


_DEEPSEEK2 = Architecture(
    gguf="deepseek2",
    model_type="deepseek_v2",
    keys=_DECODER_KEYS | _SHARED_EXPERT_KEYS | {"kv_lora_rank": "attention.kv_lora_rank"},
    optional_keys={"n_shared_experts": "expert_shared_count"},
    derive=_deepseek2,
    composed={
        "self_attn.kv_b_proj.weight": Composed(
            ("blk.{layer}.attn_k_b.weight", "blk.{layer}.attn_v_b.weight"), _kv_b, _kv_b_shape
        )
    },
)

ARCHITECTURES: dict[str, Architecture] = {
    "qwen3moe": Architecture(
        gguf="qwen3moe",
        model_type="qwen3_moe",
        keys=_GQA_KEYS | {"head_dim": "attention.key_length"},
        optional_keys={"intermediate_size": "feed_forward_length"},
        # The GGUF format has no flag for it: llama.cpp always renormalises for this family, as its models do.
        constants={"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    "qwen2moe": Architecture(
        gguf="qwen2moe",
        model_type="qwen2_moe",
        keys=_GQA_KEYS | {"shared_expert_intermediate_size": "expert_shared_feed_forward_length"},
        optional_keys={"intermediate_size": "feed_forward_length"},
        # As in llama.cpp and in the released models: routing weights keep their softmax values.
        constants={"norm_topk_prob": False, "qkv_bias": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
        transforms={"mlp.shared_expert_gate.weight": _ROW},
    ),
    "llama": Architecture(  # with experts: Mixtral, whose routing weights are always normalised
        gguf="llama",
        model_type="mixtral",
        keys=_without(_DECODER_KEYS, "moe_intermediate_size")
        | {
            "num_key_value_heads": "attention.head_count_kv",
            "num_local_experts": "expert_count",
            "intermediate_size": "feed_forward_length",
        },
        optional_keys={"head_dim": "attention.key_length"},
        transforms={
            "self_attn.q_proj.weight": _unpermuted("attention.head_count"),
            "self_attn.k_proj.weight": _unpermuted("attention.head_count_kv"),
        },
    ),
    "olmoe": Architecture(
        gguf="olmoe",
        model_type="olmoe",
        keys=_without(_GQA_KEYS, "moe_intermediate_size") | {"intermediate_size": "feed_forward_length"},
        constants={"norm_topk_prob": False, "clip_qkv": None},  # llama.cpp's reading of the family
    ),
    "glm4moe": Architecture(
        gguf="glm4moe",
        model_type="glm4_moe",
        keys=_DECODER_KEYS
        | _SHARED_EXPERT_KEYS
        | {"num_key_value_heads": "attention.head_count_kv", "head_dim": "attention.key_length"},
        optional_keys={"n_shared_experts": "expert_shared_count"},
        present={"attention_bias": "blk.0.attn_q.bias", "use_qk_norm": "blk.0.attn_q_norm.weight"},
        constants={"n_group": 1, "topk_group": 1},  # llama.cpp knows no groups in this family, nor has any model
        derive=_glm4moe,
        names=_CORRECTION,
        float32=(_BIAS,),
    ),
    "deepseek2": replace(
        _DEEPSEEK2,
        variant_key="expert_gating_func",
        variants={
            _SIGMOID: replace(
                _DEEPSEEK2, model_type="deepseek_v3", derive=_deepseek3, names=_CORRECTION, float32=(_BIAS,)
            )
        },
    ),
}
