"""Qwen3.8-Flash-Next: Qwen3.5's layers between several residual streams, sparse attention, looked-up runs of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from hybrimoe_kt.errors import ModelError
from hybrimoe_kt.weights.gguf_file import GgufFile

from .base import Architecture, Key
from .common import CHANNELS, MINUS_ONE, ROW, stacked
from .qwen import HYBRID_KEYS, HYBRID_NAMES, HYBRID_SKELETON, LINEAR_TRANSFORMS, hybrid

__all__ = ["FAMILIES"]

_INDEXER, _RUNS, _TABLE = "self_attn.indexer.", "ple.ple_embedding.", "per_layer_token_embd.weight"


def _qwen4(key: Key) -> Mapping[str, Any]:
    found = dict(hybrid(key))
    ratios = key("attention.compress_ratios", [], of_each_layer=True)[: key("block_count")]
    full = [kind == "full_attention" for kind in found["layer_types"]]
    sizes = {ratio for ratio, is_full in zip(ratios, full, strict=False) if is_full}
    if len(ratios) != len(full) or len(sizes) != 1 or any(ratios[at] for at, is_full in enumerate(full) if not is_full):
        raise ModelError(f"attention.compress_ratios {ratios} is not one number for each layer without a state")
    found |= {"indexer_kv_heads": 1, "indexer_compress_ratio": sizes.pop()} | _runs(key)
    if not found["indexer_compress_ratio"]:  # as llama.cpp reads it: every token sees all
        found |= {"indexer_compress_ratio": 1, "indexer_budget": key("context_length")}
    return found


def _runs(key: Key) -> dict[str, Any]:
    """How runs of tokens are looked up, in files that have a table of them."""
    layers = key("ple.layers", [], of_each_layer=True)
    if not layers:
        return {}
    names = ("ngram_size", "heads_per_ngram", "conv_kernel", "eos_token_id")
    values = {name: key(f"ple.{name}") for name in names}
    rows = key("ple.head_vocab_sizes", [], of_each_layer=True)
    width = key("embedding_length_per_layer_input")
    if None in values.values() or not rows or width is None:
        raise ModelError("a table of runs of tokens without its sizes cannot be read")
    key("ple.image_token_id")  # stands for a picture
    return {
        "ple_layer_ids": [layer + 1 for layer in layers],
        "ple_embed_dim": width * (values["ngram_size"] - 1) * values["heads_per_ngram"],
        "ple_conv_kernel_size": values["conv_kernel"],
        "ngram_size": values["ngram_size"],
        "heads_per_ngram": values["heads_per_ngram"],
        "ngram_vocab_size_base": rows[0],  # the first prime at or beyond the base
        "run_end_token_id": values["eos_token_id"],
    }


def _rows(file: GgufFile) -> int | None:
    """How many rows the table has, none of them more than its heads want but to be a round number."""
    return file.tensors[_TABLE].shape[0] if _TABLE in file.tensors else None


def _end_runs(model: nn.Module) -> None:
    """Let runs of tokens end where the file says, which may be one of several tokens that end an answer."""
    end = getattr(model.config, "run_end_token_id", None)
    for module in model.modules():
        if end is not None and hasattr(module, "ngram_embedding"):
            module.eos_token_id = end


FAMILIES = (
    Architecture(
        gguf="qwen4exp",
        model_type="qwen4_exp_text",
        answer_format="qwen-xml",
        shared_experts={"Qwen4ExpTextSparseMoeBlock": "shared_expert"},
        skeleton=HYBRID_SKELETON
        | {"num_hidden_layers": 48, "hc_count": 2, "hc_lowrank": 8, "ple_layer_ids": [2], "eos_token_id": 1}
        | {"ngram_vocab_size_base": 64, "heads_per_ngram": 2, "ple_embed_dim": 64}
        | {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16}
        | {"indexer_budget": 16, "indexer_compress_ratio": 4},
        pre_tokenizers=("qwen35",),
        keys={
            **HYBRID_KEYS,
            "hc_count": "hyper_connection.count",
            "hc_lowrank": "hyper_connection.low_rank",
            "indexer_n_heads": "attention.indexer.head_count",
            "indexer_head_dim": "attention.indexer.key_length",
        },
        optional_keys={"indexer_budget": "attention.indexer.top_k"},
        told_by_tensors={"make_ngram_vocab_size_divisible_by": _rows},
        constants={"norm_topk_prob": True, "output_gate_type": "sigmoid"},  # no key says it; llama.cpp knows no other
        derive=_qwen4,
        tensor_table="qwen35moe",
        names=HYBRID_NAMES
        | {
            f"{half}_hyper_connection.{ours}.weight": f"blk.{{layer}}.hc_{theirs}_{name}.weight"
            for half, theirs in (("attn", "attn"), ("mlp", "ffn"))
            for ours, name in (
                ("hc_norm", "norm"),
                ("input_mix_weight_down", "down"),
                ("input_mix_weight_up", "up"),
                ("block_inject_weight", "inject"),
            )
        }
        | {
            f"hyper_connection_mixer.{ours}.weight": f"output_hc_{name}.weight"
            for ours, name in (("hc_norm", "norm"), ("input_mix_weight_down", "down"), ("input_mix_weight_up", "up"))
        }
        | {
            f"ple.{ours}.weight": f"blk.{{layer}}.ple_{name}.weight"
            for ours, name in (
                ("key_proj", "key"),
                ("value_proj", "value"),
                ("norm_key", "norm_key"),
                ("norm_query", "norm_query"),
                ("norm_conv", "norm_conv"),
                ("conv1d", "conv1d"),
            )
        }
        | {
            _RUNS + "ngram_embedding.weight": _TABLE,
            _INDEXER + "q_layernorm.weight": "blk.{layer}.indexer.q_norm.weight",
            _INDEXER + "k_layernorm.weight": "blk.{layer}.indexer.k_norm.weight",
        },
        composed={
            _INDEXER + "index_qk_proj.weight": stacked("indexer.q_proj", "indexer.k_proj"),
        },
        stated={
            _RUNS + "layer_multipliers": "ple.layer_multipliers",
            _RUNS + "ngram_heads_vocab_sizes": "ple.head_vocab_sizes",
            _RUNS + "ngram_heads_offsets": "ple.head_offsets",
        },
        transforms=LINEAR_TRANSFORMS
        | dict.fromkeys(
            (
                "hc_norm.weight",
                "q_norm.weight",
                "k_norm.weight",
                "q_layernorm.weight",
                "k_layernorm.weight",
                "norm_key.weight",
                "norm_query.weight",
                "norm_conv.weight",
            ),
            MINUS_ONE,
        )
        | {"mlp.shared_expert_gate.weight": ROW, "ple.conv1d.weight": CHANNELS},
        finish=_end_runs,
        expert_norm="mlp_hyper_connection",
        norm_offset=1.0,
        layers_take_ids=True,
    ),
)
