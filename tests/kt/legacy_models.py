"""The families that the legacy framework knows: generated files, their configurations there, rules without a GPU."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers

from tests.support.generated_model import Shape, Type

__all__ = ["FAMILIES", "Family", "model_directory", "on_cpu"]

_Q8 = (Type.Q8_0,) * 3
_LATENT = Shape(architecture="deepseek2", layers=3, split_kv_b=False, types=_Q8, seed=3)


@dataclass(frozen=True)
class Family:
    """`rules` is our file in optimize_rules/legacy, `theirs` the framework's own."""

    shape: Shape
    rules: str
    theirs: str
    own: dict[str, Any]
    cached: bool = False
    """Whether the framework's own experts decode with a cache where there is no CUDA stream."""

    @property
    def config(self) -> dict[str, Any]:
        shape = self.shape
        return {
            "vocab_size": shape.vocab,
            "hidden_size": shape.hidden,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "num_experts_per_tok": shape.top_k,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": shape.context,
            "rope_theta": 10000.0,
            **self.own,
        }


def _latent(shape: Shape) -> dict[str, Any]:
    return {
        "num_key_value_heads": shape.heads,
        "intermediate_size": shape.dense_inter,
        "moe_intermediate_size": shape.inter,
        "n_routed_experts": shape.experts,
        "n_shared_experts": shape.shared_experts,
        "first_k_dense_replace": shape.dense_layers,
        "moe_layer_freq": 1,
        "kv_lora_rank": shape.kv_lora_rank,
        "q_lora_rank": shape.q_lora_rank or None,
        "qk_rope_head_dim": shape.rope_dim,
        "qk_nope_head_dim": shape.head_dim,
        "v_head_dim": shape.head_dim,
        "seq_aux": True,
        "rope_scaling": {
            "type": "yarn",
            "factor": shape.yarn_factor or 1.0,
            "original_max_position_embeddings": shape.context,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
        },
    }


_V3 = Shape(
    architecture="deepseek2",
    layers=3,
    split_kv_b=False,
    types=_Q8,
    q_lora_rank=64,
    yarn_factor=4.0,
    sigmoid=True,
    seed=3,
)
_SOFTMAX = {"topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False, "routed_scaling_factor": 1.0}
_SIGMOID = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 1.5}
FAMILIES: dict[str, Family] = {
    "deepseek2": Family(
        _LATENT,
        "deepseek2",
        "DeepSeek-V2-Lite-Chat",
        _latent(_LATENT) | _SOFTMAX | {"n_group": 1, "topk_group": 1},
        True,
    ),
    "deepseek3": Family(
        _V3, "deepseek3", "DeepSeek-V3-Chat", _latent(_V3) | _SIGMOID | {"n_group": 4, "topk_group": 2}, cached=True
    ),
    "qwen2moe": Family(
        Shape(architecture="qwen2moe", head_dim=64, shared_experts=2, types=_Q8),
        "qwen2moe",
        "Qwen2-57B-A14B-Instruct",
        {
            "moe_intermediate_size": 256,
            "shared_expert_intermediate_size": 512,
            "num_experts": 8,
            "norm_topk_prob": False,
        },
    ),
    "mixtral": Family(
        Shape(architecture="llama", head_dim=64, expert_tensors=True, types=_Q8),
        "mixtral",
        "Mixtral",
        {"intermediate_size": 256, "num_local_experts": 8},
    ),
}

_REST_ON_CPU = """
- match:
    name: ".*"
  replace:
    class: "default"
    kwargs: {prefill_device: "cpu", generate_device: "cpu"}
"""


def on_cpu(rules: str, **options: Any) -> str:
    """Turn a rule file's devices to the CPU, and its 4-bit GPU kernels to plain torch; `options` go to our experts."""
    text = rules.replace("cuda:0", "cpu").replace("cuda", "cpu").replace("KLinearMarlin", "KLinearTorch")
    given = "".join(f"      {name}: {json.dumps(value)}\n" for name, value in options.items())
    return text.replace("      # Any option of hybrimoe_kt", f"{given}      # Any option of hybrimoe_kt") + _REST_ON_CPU


def model_directory(folder: Path, family: Family) -> Path:
    """Write what `local_chat --model_path` reads of a DeepSeek-V2: configuration, its class, tokenizer."""
    config = family.config | {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "torch_dtype": "bfloat16",
        "eos_token_id": 256,
        "auto_map": {"AutoConfig": "configuration.DeepseekV2Config"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration.py").write_text(
        "from ktransformers.models.configuration_deepseek import DeepseekV2Config as Config\n\n\n"
        "class DeepseekV2Config(Config):\n    pass\n"
    )
    words = ["Hello", "there", *(f"word{number}" for number in range(2, 256))]  # it shows an answer word by word
    backend = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token=words[-1]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<|end|>", "<|user|>", "<|assistant|>", "<|pad|>", "<|more|>"])
    backend.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "chat_template": "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}<|assistant|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
