"""Random models in GGUF files, made the way a converter would: for tests and benchmarks, never for quality.

The generator draws weights under Hugging Face names and writes them under GGUF names from a table of its own, so
that a test can load the very same numbers into the stock model without using any of the package's mapping.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType

from tests.support.generated_builder import Builder, GeneratedModel, as_it_is
from tests.support.generated_hybrid import full_attention, linear_attention, plus_one_norm
from tests.support.generated_metadata import Shape, write_metadata
from tests.support.random_blocks import random_blocks

__all__ = ["DEEPSEEK_V2_LITE", "DEEPSEEK_V2_LITE_LAYER", "GeneratedModel", "Shape", "Type", "generate", "random_blocks"]

Type = GGMLQuantizationType
DEEPSEEK_V2_LITE_LAYER = Shape(
    architecture="deepseek2", layers=3, hidden=2048, heads=16, kv_heads=16, head_dim=128, experts=64, top_k=6,
    inter=1408, dense_inter=10944, dense_layers=1, shared_experts=2, kv_lora_rank=512, q_lora_rank=1536,
    rope_dim=64, context=4096, types=(Type.Q4_K, Type.Q4_K, Type.Q5_0), dense_type=Type.Q8_0,
)  # fmt: skip
"""DeepSeek-V2-Lite's layer shapes: one dense layer and two MoE layers of 64 experts, top-6, width 1408.

The query is low-rank as in the full DeepSeek-V2, because llama.cpp takes every other file for a 27-layer model.
"""
DEEPSEEK_V2_LITE = replace(DEEPSEEK_V2_LITE_LAYER, layers=27, q_lora_rank=0, unused_tokens=102400 - 261)
"""All of it: 15.7 billion random parameters."""


def generate(shape: Shape, path: Path, *, keep_state: bool = True) -> GeneratedModel:
    """Write a random model of `shape` to `path`; the same shape gives the same bytes."""
    build = Builder(shape, path, keep_state)
    write_metadata(build.writer, shape)
    build.dense("model.embed_tokens.weight", "token_embd.weight", shape.vocab, shape.hidden, scale=1.0)
    for layer in range(shape.layers):
        LAYERS[shape.architecture](build, layer)
    norm = plus_one_norm if shape.architecture in ("qwen3next", "qwen35moe") else Builder.norm
    norm(build, "model.norm.weight", "output_norm.weight", shape.hidden)
    build.dense("lm_head.weight", "output.weight", shape.vocab, shape.hidden)
    return build.finish()


def _attention(
    build: Builder,
    layer: int,
    *,
    bias: bool = False,
    qk_norm: str = "",
    pair_rotary: bool = False,
    after: str = "ffn_norm",
) -> None:
    """Grouped-query attention and the norms around it, up to the norm in front of the experts.

    `qk_norm`: none, one "per head", or one "across heads" for queries and keys each.
    `after` names the norm in front of the experts.
    """
    shape, hf, gguf = build.shape, f"model.layers.{layer}", f"blk.{layer}"
    build.norm(f"{hf}.input_layernorm.weight", f"{gguf}.attn_norm.weight", shape.hidden)
    for name, heads in (("q", shape.heads), ("k", shape.kv_heads), ("v", shape.kv_heads)):
        theirs, ours, rows = f"{hf}.self_attn.{name}_proj", f"{gguf}.attn_{name}", heads * shape.head_dim
        stored = partial(_rotary_pairs, heads=heads) if pair_rotary and name != "v" else as_it_is
        build.dense(f"{theirs}.weight", f"{ours}.weight", rows, shape.hidden, stored=stored)
        if bias:
            build.dense(f"{theirs}.bias", f"{ours}.bias", rows, scale=0.5)
    if qk_norm:
        for name, heads in (("q", shape.heads), ("k", shape.kv_heads)):
            width = shape.head_dim * (heads if qk_norm == "across heads" else 1)
            build.norm(f"{hf}.self_attn.{name}_norm.weight", f"{gguf}.attn_{name}_norm.weight", width)
    build.dense(
        f"{hf}.self_attn.o_proj.weight", f"{gguf}.attn_output.weight", shape.hidden, shape.heads * shape.head_dim
    )
    build.norm(f"{hf}.post_attention_layernorm.weight", f"{gguf}.{after}.weight", shape.hidden)


def _rotary_pairs(value: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head as x0, x(n/2), x1, ...: how the converter stores q and k of architecture "llama"."""
    rows = np.arange(len(value)).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)
    return value[rows]


def _router(build: Builder, layer: int) -> None:
    build.dense(
        f"model.layers.{layer}.mlp.gate.weight",
        f"blk.{layer}.ffn_gate_inp.weight",
        build.shape.experts,
        build.shape.hidden,
    )


def _qwen3moe_layer(build: Builder, layer: int) -> None:
    _attention(build, layer, qk_norm="per head")
    _router(build, layer)
    build.experts(layer)


def _qwen2moe_layer(build: Builder, layer: int) -> None:
    _attention(build, layer, bias=True)
    _router(build, layer)
    _gated_shared_expert(build, layer)
    build.experts(layer)


def _gated_shared_expert(build: Builder, layer: int) -> None:
    shape, mlp, gguf = build.shape, f"model.layers.{layer}.mlp", f"blk.{layer}"
    _ffn(build, f"{mlp}.shared_expert", f"{gguf}.ffn_{{}}_shexp", shape.inter * shape.shared_experts)
    gate = f"{gguf}.ffn_gate_inp_shexp.weight"  # some converters drop its leading dimension of one
    build.dense(f"{mlp}.shared_expert_gate.weight", gate, 1, shape.hidden, stored=lambda value: value[0])


def _mixtral_layer(build: Builder, layer: int) -> None:
    _attention(build, layer, pair_rotary=True)
    _router(build, layer)
    build.experts(layer)


def _olmoe_layer(build: Builder, layer: int) -> None:
    _attention(build, layer, qk_norm="across heads")
    _router(build, layer)
    build.experts(layer)


def _glm4moe_layer(build: Builder, layer: int) -> None:
    after = "post_attention_norm"  # what every other family calls ffn_norm
    _attention(build, layer, bias=True, qk_norm="per head" if build.shape.qk_norm else "", after=after)
    _dense_or_experts(build, layer, correction=True)


def _dense_or_experts(build: Builder, layer: int, *, correction: bool) -> None:
    """A layer of the families that begin with dense layers and have shared experts without a gate."""
    shape, mlp, gguf = build.shape, f"model.layers.{layer}.mlp", f"blk.{layer}"
    if layer < shape.dense_layers:
        _ffn(build, mlp, f"{gguf}.ffn_{{}}", shape.dense_inter)
        return
    _router(build, layer)
    if correction:
        build.dense(f"{mlp}.gate.e_score_correction_bias", f"{gguf}.exp_probs_b.bias", shape.experts, scale=0.2)
    _ffn(build, f"{mlp}.shared_experts", f"{gguf}.ffn_{{}}_shexp", shape.inter * shape.shared_experts)
    build.experts(layer)


def _hybrid_layer(build: Builder, layer: int) -> None:
    full = (layer + 1) % build.shape.full_attention_interval == 0
    (full_attention if full else linear_attention)(build, layer)
    _router(build, layer)
    _gated_shared_expert(build, layer)
    build.experts(layer)


def _granitemoe_layer(build: Builder, layer: int) -> None:
    shape = build.shape
    _attention(build, layer, pair_rotary=True)
    router = f"model.layers.{layer}.block_sparse_moe.router.weight"
    build.dense(router, f"blk.{layer}.ffn_gate_inp.weight", shape.experts, shape.hidden)
    build.experts(layer)


def _minimax_layer(build: Builder, layer: int) -> None:
    _attention(build, layer, qk_norm="across heads")
    _router(build, layer)
    bias = f"model.layers.{layer}.mlp.e_score_correction_bias"
    build.dense(bias, f"blk.{layer}.exp_probs_b.bias", build.shape.experts, scale=0.2)
    build.experts(layer)


def _ernie_layer(build: Builder, layer: int) -> None:
    _attention(build, layer)
    bias = f"model.layers.{layer}.mlp.gate.moe_statics.e_score_correction_bias"
    _dense_or_experts(build, layer, correction=False)
    if layer >= build.shape.dense_layers:
        build.dense(bias, f"blk.{layer}.exp_probs_b.bias", 1, build.shape.experts, scale=0.05)


def _deepseek2_layer(build: Builder, layer: int) -> None:
    shape, hf, gguf = build.shape, f"model.layers.{layer}", f"blk.{layer}"
    query = shape.heads * (shape.head_dim + shape.rope_dim)
    build.norm(f"{hf}.input_layernorm.weight", f"{gguf}.attn_norm.weight", shape.hidden)
    if shape.q_lora_rank:
        build.dense(f"{hf}.self_attn.q_a_proj.weight", f"{gguf}.attn_q_a.weight", shape.q_lora_rank, shape.hidden)
        build.norm(f"{hf}.self_attn.q_a_layernorm.weight", f"{gguf}.attn_q_a_norm.weight", shape.q_lora_rank)
        build.dense(f"{hf}.self_attn.q_b_proj.weight", f"{gguf}.attn_q_b.weight", query, shape.q_lora_rank)
    else:
        build.dense(f"{hf}.self_attn.q_proj.weight", f"{gguf}.attn_q.weight", query, shape.hidden)
    build.dense(
        f"{hf}.self_attn.kv_a_proj_with_mqa.weight",
        f"{gguf}.attn_kv_a_mqa.weight",
        shape.kv_lora_rank + shape.rope_dim,
        shape.hidden,
    )
    build.norm(f"{hf}.self_attn.kv_a_layernorm.weight", f"{gguf}.attn_kv_a_norm.weight", shape.kv_lora_rank)
    _kv_b(build, hf, gguf)
    build.dense(
        f"{hf}.self_attn.o_proj.weight", f"{gguf}.attn_output.weight", shape.hidden, shape.heads * shape.head_dim
    )
    build.norm(f"{hf}.post_attention_layernorm.weight", f"{gguf}.ffn_norm.weight", shape.hidden)
    _dense_or_experts(build, layer, correction=shape.sigmoid)


def _kv_b(build: Builder, hf: str, gguf: str) -> None:
    shape = build.shape
    name, per_head = f"{hf}.self_attn.kv_b_proj.weight", 2 * shape.head_dim
    if not shape.split_kv_b:
        build.dense(name, f"{gguf}.attn_kv_b.weight", shape.heads * per_head, shape.kv_lora_rank)
        return
    whole = build.draw(shape.heads, per_head, shape.kv_lora_rank)
    k_b = build.write_heads(f"{gguf}.attn_k_b.weight", whole[:, : shape.head_dim].transpose(0, 2, 1))
    v_b = build.write_heads(f"{gguf}.attn_v_b.weight", whole[:, shape.head_dim :])
    stored = np.concatenate((k_b.transpose(0, 2, 1), v_b), axis=1)
    build.remember(name, stored.reshape(shape.heads * per_head, shape.kv_lora_rank))


def _ffn(build: Builder, hf: str, gguf: str, inter: int) -> None:
    for name in ("gate", "up"):
        build.dense(f"{hf}.{name}_proj.weight", gguf.format(name) + ".weight", inter, build.shape.hidden)
    build.dense(f"{hf}.down_proj.weight", gguf.format("down") + ".weight", build.shape.hidden, inter)


LAYERS: dict[str, Callable[[Builder, int], None]] = {
    "qwen3moe": _qwen3moe_layer,
    "qwen2moe": _qwen2moe_layer,
    "llama": _mixtral_layer,
    "olmoe": _olmoe_layer,
    "glm4moe": _glm4moe_layer,
    "deepseek2": _deepseek2_layer,
    "qwen3next": _hybrid_layer,
    "qwen35moe": _hybrid_layer,
    "granitemoe": _granitemoe_layer,
    "minimax-m2": _minimax_layer,
    "ernie4_5-moe": _ernie_layer,
}
