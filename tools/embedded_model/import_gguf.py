"""Reads a qwen3moe GGUF file back into the network, quantised weights as what they mean: evaluation sees the file."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch

from .model import Model, Shape


def read(path: Path) -> Model:
    """The model of a file that ``export.py`` wrote (or the earlier prototype's exporter)."""
    reader = gguf.GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    if architecture != "qwen3moe":
        raise SystemExit(f"{path} is a {architecture} model; only qwen3moe can be evaluated.")
    model = Model(_shape(reader))
    weights = {t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors}
    state = {"embedding.weight": weights["token_embd.weight"], "norm.weight": weights["output_norm.weight"]}
    for layer in range(model.shape.num_layers):
        for ours, theirs in _NAMES.items():
            parts = [weights[f"blk.{layer}.{name}.weight"] for name in theirs]
            axis = 1 if ours == "moe.gate_up" else 0
            state[f"blocks.{layer}.{ours}"] = np.concatenate(parts, axis)
    model.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in state.items()})
    return model.requires_grad_(False).eval()


_NAMES = {
    "attention_norm.weight": ("attn_norm",),
    "attention.qkv.weight": ("attn_q", "attn_k", "attn_v"),
    "attention.out.weight": ("attn_output",),
    "attention.q_norm.weight": ("attn_q_norm",),
    "attention.k_norm.weight": ("attn_k_norm",),
    "moe_norm.weight": ("ffn_norm",),
    "moe.router.weight": ("ffn_gate_inp",),
    "moe.gate_up": ("ffn_gate_exps", "ffn_up_exps"),
    "moe.down": ("ffn_down_exps",),
}


def _shape(reader: gguf.GGUFReader) -> Shape:
    def field(name: str) -> int | float:
        return reader.fields[f"qwen3moe.{name}"].contents()

    return Shape(
        num_layers=field("block_count"),
        num_experts=field("expert_count"),
        top_k=field("expert_used_count"),
        hidden_size=field("embedding_length"),
        expert_size=field("expert_feed_forward_length"),
        num_heads=field("attention.head_count"),
        num_kv_heads=field("attention.head_count_kv"),
        head_dim=field("attention.key_length"),
        vocab_size=len(reader.fields["tokenizer.ggml.tokens"].contents()),
        context=field("context_length"),
        rope_theta=field("rope.freq_base"),
        rms_eps=field("attention.layer_norm_rms_epsilon"),
    )
