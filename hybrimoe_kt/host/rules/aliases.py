"""What the names in legacy kTransformers rule files mean here: tables, and the functions that read them.

Legacy files were written for kTransformers' copies of modelling code and for its operators. Three kinds
of names differ:

- `match.class`: `ktransformers.models.modeling_X.Y` is a class of Transformers now, sometimes spelled differently.
- `match.name`: Mixtral's MoE block was `block_sparse_moe` and is `mlp` in Transformers 5.
- `replace.class`: the experts, linear and MLA operators and blocks with shared experts have successors here, and so
  have our own operators for that framework; RoPE, norm, MLP, gate, model and other block operators only made the stock
  module faster, so the stock module stays ("default").
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrimoe_kt.errors import nearest

__all__ = ["legacy_hint", "legacy_spelling", "match_class", "operator_class", "operator_kwargs"]

EXPERTS = "hybrimoe_kt.operators.experts.HybriMoEExperts"
MLA = "hybrimoe_kt.operators.attention_mla.AbsorbedMLA"
LINEAR = "hybrimoe_kt.operators.linear.QuantizedLinear"
BLOCK = "hybrimoe_kt.operators.moe_block.MoEBlock"
STOCK = "default"
# Legacy options that keep their meaning; the others choose among legacy kernels.
DEVICE_KWARGS = ("generate_device", "prefill_device")
KEPT_KWARGS = {MLA: (*DEVICE_KWARGS, "absorb_for_prefill")}
# Operators of hybrimoe_kt.host.kt in files of optimize_rules/legacy; their options are this host's too.
LEGACY_EXPERTS = "hybrimoe_kt.host.kt.experts.HybriMoEExperts"
LEGACY_BLOCKS = "hybrimoe_kt.host.kt.blocks."

_MODELS = "ktransformers.models."
_OPERATORS = "ktransformers.operators."


def _same_names(model: str, prefix: str, *suffixes: str) -> dict[str, str]:
    home = f"transformers.models.{model}.modeling_{model}."
    return {f"modeling_{model}.{prefix}{suffix}": f"{home}{prefix}{suffix}" for suffix in suffixes}


_COMMON = ("RotaryEmbedding", "RMSNorm", "MLP", "Attention", "DecoderLayer", "Model", "ForCausalLM")
_V2 = "transformers.models.deepseek_v2.modeling_deepseek_v2.DeepseekV2"
_V3 = "transformers.models.deepseek_v3.modeling_deepseek_v3.DeepseekV3"

MATCH_CLASSES: dict[str, str] = {
    **{f"modeling_deepseek.DeepseekV2{suffix}": _V2 + suffix for suffix in _COMMON},
    # One rotary class serves every scaling type now; its position among the modules moved from the layer to the model.
    "modeling_deepseek.DeepseekV2YarnRotaryEmbedding": _V2 + "RotaryEmbedding",
    "modeling_deepseek.DeepseekV2MoE": _V2 + "Moe",
    "modeling_deepseek.MoEGate": _V2 + "TopkRouter",
    **_same_names("deepseek_v3", "DeepseekV3", *_COMMON, "MoE"),
    "modeling_deepseek_v3.DeepseekV3YarnRotaryEmbedding": _V3 + "RotaryEmbedding",
    "modeling_deepseek_v3.MoEGate": _V3 + "TopkRouter",
    **_same_names("qwen2_moe", "Qwen2Moe", *_COMMON, "SparseMoeBlock"),
    **_same_names("qwen3_moe", "Qwen3Moe", *_COMMON, "SparseMoeBlock"),
    **_same_names("qwen3_next", "Qwen3Next", *_COMMON, "SparseMoeBlock", "GatedDeltaNet"),
    **_same_names("glm4_moe", "Glm4Moe", *_COMMON, "MoE"),
    **_same_names("mixtral", "Mixtral", *(name for name in _COMMON if name != "MLP"), "SparseMoeBlock"),
    **_same_names("llama", "Llama", *_COMMON),
}

# A legacy file written for Qwen3-MoE names Qwen2-MoE's rotary class, which legacy modelling code shared.
SHARED_CLASSES: dict[str, tuple[str, ...]] = {
    "modeling_qwen2_moe.Qwen2MoeRotaryEmbedding": (
        "transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeRotaryEmbedding",
    ),
}

# Legacy operator module -> what its classes mean here -> the classes.
OPERATORS: dict[str, dict[str, str]] = {
    "experts": {
        EXPERTS: "KTransformersExperts KTransformersExpertsV2 KGlm4Experts KSmallthinkerExperts",
        BLOCK: (
            "KQwen2MoeSparseMoeBlock KQwen2MoeSparseMoeBlockV2 KQwen3NextSparseMoeBlockV2 KDeepseekV2MoE "
            "KDeepseekV3MoE KDeepseekV3MoEV2 KGlm4MoeMoE"
        ),
        STOCK: "KQwen3MoeSparseMoeBlock KQwen3MoeSparseMoeBlockV2 KMistralSparseMoEBlock KSmallthinkerMoeBlock",
    },
    "attention": {MLA: "KDeepseekV2Attention", STOCK: "KLlamaAttention KQwen3MoeAttention KQwen3MoeAttentionIPEXLLM"},
    "balance_serve_attention": {
        MLA: "flashinfer_attn deepseek_torch_attn",
        STOCK: (
            "KQwen2MoeAttention KQwen3MoeAttention KQwen3NextAttention KQwen3NextGatedDeltaNet KGlm4MoeAttention "
            "KSmallthinkerAttention"
        ),
    },
    "linear": {LINEAR: "KTransformersLinear"},
    "RoPE": {
        STOCK: (
            "RotaryEmbedding RotaryEmbeddingV2 RotaryEmbeddingV3 RotaryEmbeddingV4 YarnRotaryEmbedding "
            "YarnRotaryEmbeddingV3 DynamicNTKScalingRotaryEmbedding KQwen3MoeRotaryEmbedding KGlm4MoeRotaryEmbedding "
            "KSmallthinkerRotaryEmbedding"
        )
    },
    "layernorm": {
        STOCK: (
            "RMSNorm KQwen2MoeRMSNorm KQwen3MoeRMSNorm KQwen3NextRMSNorm KGlm4MoeRMSNorm KSmallthinkerRMSNorm "
            "DeepseekV3RMSNormTorch KDeepseekRMSNormIPEXLLM"
        )
    },
    "mlp": {STOCK: "kDeepseekV3MLP KQwen2MoeMLP KGlm4MoeMLP KSmallthinkerDenseMlpBlock"},
    "gate": {STOCK: "KMoEGate KMoEGateQwen2Moe KMoEGateIPEXLLM"},
    "models": {STOCK: "KQwen2MoeModel KQwen3MoeModel KDeepseekV2Model KLlamaModel"},
}
OPERATOR_CLASSES: dict[str, str] = {
    f"{_OPERATORS}{module}.{name}": meaning
    for module, meanings in OPERATORS.items()
    for meaning, names in meanings.items()
    for name in names.split()
}

# model_type -> (path segment now, its legacy spelling)
PATH_SPELLINGS: dict[str, tuple[str, str]] = {"mixtral": ("mlp", "block_sparse_moe")}


def match_class(name: str) -> tuple[str, ...]:
    """Return the classes that a `match.class` stands for: itself unless it is a legacy modelling class."""
    if not name.startswith(_MODELS):
        return (name,)
    short = name.removeprefix(_MODELS)
    found = MATCH_CLASSES.get(short)
    return (found, *SHARED_CLASSES.get(short, ())) if found else (name,)


def operator_class(name: str) -> str:
    """Return the class that a `replace.class` stands for: itself unless it is a known legacy operator."""
    if name.startswith(LEGACY_BLOCKS):
        return STOCK if name.endswith("MixtralBlock") else BLOCK
    return EXPERTS if name == LEGACY_EXPERTS else OPERATOR_CLASSES.get(name, name)


def operator_kwargs(name: str, successor: str, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Split the kwargs of operator `name` into those that its successor takes too, and the names of the rest."""
    if name == LEGACY_EXPERTS:
        return dict(kwargs), []
    valid = KEPT_KWARGS.get(successor, DEVICE_KWARGS)
    kept = {name: value for name, value in kwargs.items() if name in valid}
    return kept, [name for name in kwargs if name not in kept]


def legacy_hint(name: str) -> str:
    """Return what to add to an error about a legacy class: that it is unknown here, and the nearest known one."""
    if not name.startswith("ktransformers."):
        return ""
    known = [*OPERATOR_CLASSES, *(_MODELS + short for short in MATCH_CLASSES)]
    return f"; no counterpart of this legacy class is known here{nearest(name, known)}"


def legacy_spelling(pattern: str, path: str, model_type: str) -> str:
    """Return the path as `pattern` spells it.

    A pattern that mentions the legacy segment is matched against the path written with that segment, every other
    pattern against the path as it is. Never against both: a negative look-ahead that excludes `block_sparse_moe`
    must not be satisfied by the other spelling.
    """
    now, legacy = PATH_SPELLINGS.get(model_type, ("", ""))
    if not now or legacy not in pattern:
        return path
    return ".".join(legacy if segment == now else segment for segment in path.split("."))
