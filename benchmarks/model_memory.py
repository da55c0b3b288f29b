"""What released models take of disk, host and GPU memory: arithmetic on their published dimensions, nothing is run.

    python -m benchmarks.model_memory          print the tables
    python -m benchmarks.model_memory --write  put them into README.md and docs/models.md

Parameters are counted in the model that Transformers builds from the published configuration, without weights. Bytes of
experts are those of this program's own loader, slots and CPU kernels, for the types llama.cpp gives a Q4_K_M file: gate
and up Q4_K, down Q4_K in half of the layers and Q6_K in the others (Q5_0 and Q8_0 where the width is no multiple of
256). All other weights count `DENSE_BITS` in the file. On a CPU matrices stay as they are, and what is no matrix or
routes is float32; on a GPU all of it is bfloat16.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hybrimoe_kt.config import ExpertOptions
from hybrimoe_kt.device.experts import ExpertMatrix, LayerExperts
from hybrimoe_kt.device.layout import SlotLayout
from hybrimoe_kt.host.doctor.model import host_expert_bytes
from hybrimoe_kt.quants import row_bytes

ROOT = Path(__file__).parents[1]
GIB = 2**30
CONTEXT_TOKENS = 8192
DENSE_BITS = 5.0
"""Bits a weight of everything but routed experts in a Q4_K_M file: Q4_K is 4.5, a few tensors are Q6_K."""
Q4_K, Q5_0, Q6_K, Q8_0 = 12, 6, 14, 8
CARDS_GIB = (16, 24)
_PACKED = nn.Linear, nn.Embedding
"""What rules keep as the file has it, on a CPU."""


@dataclass(frozen=True, slots=True, eq=False)
class Release:
    """A released model: its Transformers model type, published dimensions, and published number of parameters."""

    name: str
    gguf: str
    model_type: str
    published_params: float
    dimensions: Mapping[str, Any]


def _gqa(layers: int, hidden: int, heads: int, kv_heads: int, head_dim: int, vocabulary: int) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": head_dim, "vocab_size": vocabulary,
    }  # fmt: skip


def _mla(layers: int, hidden: int, heads: int, q_rank: int | None, vocabulary: int) -> dict[str, Any]:
    """DeepSeek's latent attention; all releases share rank and head sizes."""
    return {
        "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": heads,
        "q_lora_rank": q_rank, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "vocab_size": vocabulary,
    }  # fmt: skip


def _experts(count: int, top_k: int, width: int, count_key: str = "num_experts", **more: Any) -> dict[str, Any]:
    return {count_key: count, "num_experts_per_tok": top_k, "moe_intermediate_size": width, **more}


def _routed(count: int, top_k: int, width: int, shared: int, dense_layers: int, dense_width: int) -> dict[str, Any]:
    """Experts as DeepSeek and GLM configure them."""
    return _experts(
        count, top_k, width, "n_routed_experts",
        n_shared_experts=shared, first_k_dense_replace=dense_layers, intermediate_size=dense_width, n_group=1,
        topk_group=1,
    )  # fmt: skip


def _ernie(count: int, top_k: int, width: int, shared: int, first: int, layers: int, dense: int) -> dict[str, Any]:
    return {
        "moe_num_experts": count, "moe_k": top_k, "moe_intermediate_size": width, "moe_num_shared_experts": shared,
        "moe_layer_start_index": first, "moe_layer_end_index": layers - 1, "intermediate_size": dense,
    }  # fmt: skip


RELEASES = (
    Release("Granite-3.0-1B-A400M", "granitemoe", "granitemoe", 1.3e9, {
        **_gqa(24, 1024, 16, 8, 64, 49155), "num_local_experts": 32, "num_experts_per_tok": 8,
        "intermediate_size": 512, "tie_word_embeddings": True}),
    Release("Granite-3.0-3B-A800M", "granitemoe", "granitemoe", 3.3e9, {
        **_gqa(32, 1536, 24, 8, 64, 49155), "num_local_experts": 40, "num_experts_per_tok": 8,
        "intermediate_size": 512, "tie_word_embeddings": True}),
    Release("OLMoE-1B-7B", "olmoe", "olmoe", 6.92e9, {
        **_gqa(16, 2048, 16, 16, 128, 50304), **_experts(64, 8, 1024), "intermediate_size": 1024}),
    Release("Qwen1.5-MoE-A2.7B", "qwen2moe", "qwen2_moe", 14.3e9, {
        **_gqa(24, 2048, 16, 16, 128, 151936), **_experts(60, 4, 1408, shared_expert_intermediate_size=5632)}),
    Release("DeepSeek-V2-Lite", "deepseek2", "deepseek_v2", 15.7e9, {
        **_mla(27, 2048, 16, None, 102400), **_routed(64, 6, 1408, 2, 1, 10944)}),
    Release("ERNIE-4.5-21B-A3B", "ernie4_5-moe", "ernie4_5_moe", 21.8e9, {
        **_gqa(28, 2560, 20, 4, 128, 103424), **_ernie(64, 6, 1536, 2, 1, 28, 12288)}),
    Release("Qwen3-30B-A3B", "qwen3moe", "qwen3_moe", 30.5e9, {
        **_gqa(48, 2048, 32, 4, 128, 151936), **_experts(128, 8, 768)}),
    Release("Qwen3.5-35B-A3B", "qwen35moe", "qwen3_5_moe_text", 35e9, {
        **_gqa(40, 2048, 16, 2, 256, 248320), **_experts(256, 8, 512, shared_expert_intermediate_size=512)}),
    Release("Mixtral-8x7B", "llama", "mixtral", 46.7e9, {
        **_gqa(32, 4096, 32, 8, 128, 32000), "num_local_experts": 8, "num_experts_per_tok": 2,
        "intermediate_size": 14336}),
    Release("Qwen2-57B-A14B", "qwen2moe", "qwen2_moe", 57.4e9, {
        **_gqa(28, 3584, 28, 4, 128, 151936), **_experts(64, 8, 2560, shared_expert_intermediate_size=20480)}),
    Release("Qwen3-Next-80B-A3B", "qwen3next", "qwen3_next", 80e9, {
        **_gqa(48, 2048, 16, 2, 256, 151936), **_experts(512, 10, 512, shared_expert_intermediate_size=512)}),
    Release("GLM-4.5-Air", "glm4moe", "glm4_moe", 106e9, {
        **_gqa(46, 4096, 96, 8, 128, 151552), **_routed(128, 8, 1408, 1, 1, 10944)}),
    Release("Mixtral-8x22B", "llama", "mixtral", 140.6e9, {
        **_gqa(56, 6144, 48, 8, 128, 32768), "num_local_experts": 8, "num_experts_per_tok": 2,
        "intermediate_size": 16384}),
    Release("MiniMax-M2", "minimax-m2", "minimax_m2", 230e9, {
        **_gqa(62, 3072, 48, 8, 128, 200064), "num_local_experts": 256, "num_experts_per_tok": 8,
        "intermediate_size": 1536}),
    Release("Qwen3-235B-A22B", "qwen3moe", "qwen3_moe", 235e9, {
        **_gqa(94, 4096, 64, 4, 128, 151936), **_experts(128, 8, 1536)}),
    Release("DeepSeek-V2", "deepseek2", "deepseek_v2", 236e9, {
        **_mla(60, 5120, 128, 1536, 102400), **_routed(160, 6, 1536, 2, 1, 12288)}),
    Release("ERNIE-4.5-300B-A47B", "ernie4_5-moe", "ernie4_5_moe", 300e9, {
        **_gqa(54, 8192, 64, 8, 128, 103424), **_ernie(64, 8, 3584, 0, 3, 54, 28672)}),
    Release("GLM-4.5", "glm4moe", "glm4_moe", 355e9, {
        **_gqa(92, 5120, 96, 8, 128, 151552), **_routed(160, 8, 1536, 1, 3, 12288)}),
    Release("DeepSeek-V3, R1", "deepseek2", "deepseek_v3", 671e9, {
        **_mla(61, 7168, 128, 1536, 129280), **_routed(256, 8, 2048, 1, 3, 18432)}),
    Release("Kimi-K2", "deepseek2", "deepseek_v3", 1.03e12, {
        **_mla(61, 7168, 64, 1536, 163840), **_routed(384, 8, 2048, 1, 1, 18432)}),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes unless the name says otherwise; see the columns of docs/models.md."""

    params: int
    dense_params: int
    float_params: int
    """Of these, what is float32 on a CPU: norms, routers, what is small."""
    file: float
    host_experts: int
    """Experts in host memory where the CPU alone computes: the file's pages, or a padded copy instead of them."""
    host_beside_gpu: int
    """The same beside a GPU, which reads the file's pages also where the CPU has a padded copy."""
    num_experts: int
    """Of a layer."""
    slot_in_each: int
    """One slot in every layer."""
    read_per_token: float
    """Expert weights that one token uses."""
    kv_cache: int

    @property
    def host_alone(self) -> int:
        """Host memory when everything is computed on the CPU: the file's pages, and a few floats."""
        packed = (self.dense_params - self.float_params) * DENSE_BITS / 8
        return round(self.host_experts + packed) + 4 * self.float_params

    @property
    def gpu_least(self) -> int:
        """Dense weights in bfloat16, the KV cache and what is left free for the rest: a card without any slot."""
        return 2 * self.dense_params + self.kv_cache + ExpertOptions().reserve_bytes

    def share(self, card_bytes: int) -> float | None:
        """How many of all experts have room on a card of which all is free; None where not even the rest has.

        As `cache_size: auto` does it: the same whole number of slots in every layer.
        """
        room = card_bytes - self.gpu_least
        return min(room // self.slot_in_each, self.num_experts) / self.num_experts if room >= 0 else None


def build(release: Release) -> nn.Module:
    """Return the model without weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(release.model_type, **release.dimensions)
        )
    return model


@functools.cache
def memory(release: Release) -> Memory:
    """Compute one model's row."""
    model = build(release)
    config: Any = model.config
    routed = [module for name, module in model.named_modules() if name.endswith(".experts")]
    params = sum(parameter.numel() for parameter in model.parameters())
    dense = params - sum(parameter.numel() for module in routed for parameter in module.parameters())
    packed = {id(module.weight): module.weight.numel() for module in model.modules() if type(module) in _PACKED}
    layers = [_layer(number, module, int(config.num_experts_per_tok)) for number, module in enumerate(routed)]
    experts = sum(layer.num_experts * layer.expert_bytes for layer in layers)
    return Memory(
        params=params,
        dense_params=dense,
        float_params=dense - sum(packed.values()),
        file=experts + dense * DENSE_BITS / 8,
        host_experts=sum(host_expert_bytes(layer, transfers=False) for layer in layers),
        host_beside_gpu=sum(host_expert_bytes(layer, transfers=True) for layer in layers),
        num_experts=layers[0].num_experts,
        slot_in_each=sum(SlotLayout(layer).slot_bytes for layer in layers),
        read_per_token=sum(layer.top_k * layer.expert_bytes for layer in layers),
        kv_cache=CONTEXT_TOKENS * _kv_bytes_per_token(config),
    )


def _layer(number: int, module: Any, top_k: int) -> LayerExperts:
    """One layer's experts as this program would load them: every other layer has the larger type for down."""
    count, hidden, width = module.num_experts, module.hidden_dim, module.intermediate_dim
    pair = (Q4_K, Q6_K) if width % 256 == 0 else (Q5_0, Q8_0)

    def matrix(kind: int, rows: int, columns: int) -> ExpertMatrix:
        data = torch.empty((count, rows * row_bytes(kind, columns)), dtype=torch.uint8, device="meta")
        return ExpertMatrix(data, kind, rows, columns)

    gate, up = matrix(Q4_K, width, hidden), matrix(Q4_K, width, hidden)
    return LayerExperts(number, count, top_k, hidden, width, gate, up, matrix(pair[number % 2], hidden, width))


def _kv_bytes_per_token(config: Any) -> int:
    """bfloat16 keys and values, or DeepSeek's latents; linear attention's state does not grow and is left out."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    num_full = sum(kind != "linear_attention" for kind in kinds)
    if getattr(config, "kv_lora_rank", None):
        return 2 * num_full * int(config.kv_lora_rank + config.qk_rope_head_dim)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * num_full * 2 * int(config.num_key_value_heads * head_dim)


def long_table() -> str:
    """Every model with every column, for docs/models.md."""
    heads = [
        "model",
        "parameters, 10⁹",
        "file",
        "read per token",
        "RAM, CPU only",
        "RAM beside a GPU",
        "dense",
        "KV cache",
    ]
    rows = []
    for release in RELEASES:
        m = memory(release)
        sizes = (m.file, m.read_per_token, m.host_alone, m.host_beside_gpu, 2 * m.dense_params, m.kv_cache)
        rows.append([release.name, f"{m.params / 1e9:.1f}", *map(_size, sizes), *_shares(m)])
    return _markdown([*heads, *_CARD_HEADS], rows)


def short_table() -> str:
    """The models most asked for, for the README."""
    rows = []
    for release in RELEASES:
        if release.name in SHORT:
            m = memory(release)
            rows.append([release.name, *map(_size, (m.file, m.host_beside_gpu, m.gpu_least)), *_shares(m)])
    return _markdown(["model", "file", "RAM", "GPU at least", *_CARD_HEADS], rows)


SHORT = (
    "OLMoE-1B-7B", "DeepSeek-V2-Lite", "Qwen3-30B-A3B", "Mixtral-8x7B", "Qwen2-57B-A14B", "Qwen3-Next-80B-A3B",
    "GLM-4.5-Air", "Qwen3-235B-A22B", "DeepSeek-V3, R1",
)  # fmt: skip
_CARD_HEADS = [f"in {card} GiB" for card in CARDS_GIB]


def _shares(m: Memory) -> list[str]:
    """Shares of the experts; "none" where a layer gets no slot, "-" where the card is too small for the rest."""
    names = {0.0: "none", 1.0: "all"}
    shares = [m.share(card * GIB) for card in CARDS_GIB]
    return ["-" if share is None else names.get(share, f"{share:.0%}") for share in shares]


def _size(num_bytes: float) -> str:
    """In GiB, two figures or all before the point."""
    gib = num_bytes / GIB
    return f"{gib:.0f}" if gib >= 99.5 else f"{gib:.1f}" if gib >= 0.95 else f"{gib:.2f}"


def _markdown(heads: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "--:|" * (len(heads) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


PLACES = {"README.md": short_table, "docs/models.md": long_table}
_BEGIN, _END = "<!-- computed by python -m benchmarks.model_memory --write -->\n", "<!-- end -->"


def with_table(text: str, table: str) -> str:
    """Return a document's text with what stands between the marks replaced."""
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    assert begin and end, f"the marks {_BEGIN.strip()} and {_END.strip()} are both needed"
    return f"{before}{begin}\n{table}\n\n{end}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory that released models need, computed from their dimensions.")
    parser.add_argument("--write", action="store_true", help="put the tables into README.md and docs/models.md")
    options = parser.parse_args()
    for name, table in PLACES.items():
        file = ROOT / name
        if options.write:
            file.write_text(with_table(file.read_text(encoding="utf-8"), table()), encoding="utf-8")
        else:
            print(f"{name}\n\n{table()}\n")


if __name__ == "__main__":
    main()
