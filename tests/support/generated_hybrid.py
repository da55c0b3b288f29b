"""Layers of generated models with linear attention: Qwen3-Next and Qwen3.5-MoE, as a converter writes them."""

from __future__ import annotations

import numpy as np

from tests.support.generated_builder import Builder
from tests.support.generated_metadata import LINEAR_KERNEL

__all__ = ["full_attention", "linear_attention", "plus_one_norm"]


def plus_one_norm(build: Builder, hf_name: str, gguf_name: str, size: int) -> None:
    """A norm whose model keeps the distance from one; files hold the factor."""
    build.dense(hf_name, gguf_name, size, scale=0.1, stored=lambda value: value + 1)


def full_attention(build: Builder, layer: int) -> None:
    """Grouped-query attention whose query projection also makes a gate, and the norms around it."""
    shape, hf, gguf = build.shape, f"model.layers.{layer}", f"blk.{layer}"
    plus_one_norm(build, f"{hf}.input_layernorm.weight", f"{gguf}.attn_norm.weight", shape.hidden)
    for name, rows in (("q", 2 * shape.heads), ("k", shape.kv_heads), ("v", shape.kv_heads)):
        rows *= shape.head_dim
        build.dense(f"{hf}.self_attn.{name}_proj.weight", f"{gguf}.attn_{name}.weight", rows, shape.hidden)
    for name in ("q", "k"):
        plus_one_norm(build, f"{hf}.self_attn.{name}_norm.weight", f"{gguf}.attn_{name}_norm.weight", shape.head_dim)
    width = shape.heads * shape.head_dim
    build.dense(f"{hf}.self_attn.o_proj.weight", f"{gguf}.attn_output.weight", shape.hidden, width)
    plus_one_norm(build, f"{hf}.post_attention_layernorm.weight", f"{gguf}.post_attention_norm.weight", shape.hidden)


def linear_attention(build: Builder, layer: int) -> None:
    """A gated delta rule. Qwen3.5's files have the value heads tiled over the key heads, the model has them grouped."""
    shape, gguf = build.shape, f"blk.{layer}"
    hf, linear = f"model.layers.{layer}", f"model.layers.{layer}.linear_attn"
    key_heads, value_heads = shape.linear_heads
    dim, per_key = shape.head_dim // 2, value_heads // key_heads
    keys, values = key_heads * dim, value_heads * dim
    tiled = shape.architecture == "qwen35moe"
    plus_one_norm(build, f"{hf}.input_layernorm.weight", f"{gguf}.attn_norm.weight", shape.hidden)

    def heads(value: np.ndarray, width: int, axis: int = 0) -> np.ndarray:
        if not tiled:
            return value
        split = (*value.shape[:axis], key_heads, per_key, width, *value.shape[axis + 1 :])
        return value.reshape(split).swapaxes(axis, axis + 1).reshape(value.shape)

    def after_keys(value: np.ndarray) -> np.ndarray:
        return np.concatenate((value[: 2 * keys], heads(value[2 * keys :], dim)))

    parts = [build.draw(rows, shape.hidden) for rows in (keys, keys, values, values)]
    query_key_value, gate = np.concatenate(parts[:3]), parts[3]
    build.write(f"{gguf}.attn_qkv.weight", after_keys(query_key_value))
    build.write(f"{gguf}.attn_gate.weight", heads(gate, dim))
    if tiled:
        build.remember(f"{linear}.in_proj_qkv.weight", query_key_value)
        build.remember(f"{linear}.in_proj_z.weight", gate)
        for name, theirs in (("b", "ssm_beta"), ("a", "ssm_alpha")):
            value = build.draw(value_heads, shape.hidden)
            build.write(f"{gguf}.{theirs}.weight", heads(value, 1))
            build.remember(f"{linear}.in_proj_{name}.weight", value)
    else:
        by_head = [part.reshape(key_heads, -1, shape.hidden) for part in parts]
        build.remember(f"{linear}.in_proj_qkvz.weight", np.concatenate(by_head, axis=1).reshape(-1, shape.hidden))
        build.dense(f"{linear}.in_proj_ba.weight", f"{gguf}.ssm_ba.weight", 2 * value_heads, shape.hidden)
    kernel = build.draw(2 * keys + values, LINEAR_KERNEL)
    build.write(f"{gguf}.ssm_conv1d.weight", after_keys(kernel))
    build.remember(f"{linear}.conv1d.weight", kernel[:, None])
    for name, theirs, stored in (("dt_bias", "ssm_dt.bias", lambda v: v), ("A_log", "ssm_a", lambda v: -np.exp(v))):
        value = build.draw(value_heads, scale=0.5)
        build.write(f"{gguf}.{theirs}", heads(stored(value), 1))
        build.remember(f"{linear}.{name}", value)
    build.norm(f"{linear}.norm.weight", f"{gguf}.ssm_norm.weight", dim)
    out = build.draw(shape.hidden, values)
    build.write(f"{gguf}.ssm_out.weight", heads(out, dim, axis=1))
    build.remember(f"{linear}.out_proj.weight", out)
    plus_one_norm(build, f"{hf}.post_attention_layernorm.weight", f"{gguf}.post_attention_norm.weight", shape.hidden)
