"""What released models take of disk, host and GPU memory: arithmetic on their published dimensions, nothing is run.

    python -m benchmarks.model_memory          print the tables
    python -m benchmarks.model_memory --write  put them into README.md and docs/models.md

Parameters are counted in the model that Transformers builds from the published configuration, without weights. Bytes
are those of this program's own loader, slots, kernels and plans (`core.memory_plan`), for the types of two mixtures,
`Q4_K_M` and `TWO_BITS`. Norms, routers and what is small are float32 in the file and on a CPU, bfloat16 on a GPU.
"""

from __future__ import annotations

import argparse
import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from hybrimoe_kt.backends.gpu_triton import TritonGpu
from hybrimoe_kt.config import ExpertOptions
from hybrimoe_kt.core.card_needs import CardNeeds
from hybrimoe_kt.core.memory_plan import CONTEXT_BYTES, LIBRARY_BYTES, MemoryPlan, plan_card
from hybrimoe_kt.device.experts import ExpertMatrix, LayerExperts
from hybrimoe_kt.expert_form import ExpertForm
from hybrimoe_kt.host.card_plan import HOST, DenseTensor, card_needs
from hybrimoe_kt.host.doctor.model import host_expert_bytes
from hybrimoe_kt.host.hf.language_models import language_model
from hybrimoe_kt.quants import TYPES, row_bytes
from hybrimoe_kt.sizes import CacheSize

ROOT = Path(__file__).parents[1]
GIB = 2**30
CONTEXT_TOKENS = 8192
F32, Q5_0, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, BF16, MXFP4 = 0, 6, 8, 10, 11, 12, 13, 14, 20, 30, 39
CARDS_GIB = (16, 24)
BIG_PARAMS = 100e9
"""From which on files of two bits are worth a look."""
_GPU = "cuda"
_LAYER = re.compile(r"\.layers\.(\d+)\.")
_PACKED = re.compile(r"lm_head$|(?<!weights)_proj\w*$|\.feed_forward\.w[123]$|\.indexer\.w(q_b|k)$")
"""The linear layers that the rule files leave as the file has them."""


class Mixture(NamedTuple):
    """Which types a file has: of experts' gate and up, of their down in even and odd layers, and of the rest.

    `dense`, and `dense_more` for values and down projections in half of the layers; `fused` for queries, keys and
    values in one. Latent attention's up-projections are Q8_0; `head` is the head's, `embedding` an
    embedding's that is looked up.
    """

    gate_up: int
    down: tuple[int, int]
    dense: int
    dense_more: int
    fused: int
    head: int = Q6_K
    embedding: int = Q4_K


Q4_K_M = Mixture(Q4_K, (Q4_K, Q6_K), Q4_K, Q6_K, Q5_K)
"""As llama.cpp makes it."""
TWO_BITS = Mixture(Q2_K, (Q3_K, Q3_K), Q6_K, Q6_K, Q6_K)
"""Assumed: what files of two to three bits a weight have in common, experts small and the rest well above."""
MXFP4_FILE = Mixture(MXFP4, (MXFP4, MXFP4), Q8_0, Q8_0, Q8_0, Q8_0, Q8_0)
"""As gpt-oss is published in GGUF: experts as they were trained, the rest in 8 bits."""
_NARROW = {Q4_K: Q5_0, Q5_K: Q5_0, Q6_K: Q8_0, Q2_K: IQ4_NL, Q3_K: IQ4_NL}
"""What llama.cpp takes instead where a row is no whole number of blocks of 256."""


class _EveryType(TritonGpu):
    """As if there were kernels for every type of the mixtures."""

    @classmethod
    def refuses(cls, experts: LayerExperts) -> str | None:
        return None


@dataclass(frozen=True, slots=True, eq=False)
class Release:
    """A released model: its Transformers model type, published dimensions, and published number of parameters.

    Dimensions that are Transformers' own defaults for the type are left out.
    """

    name: str
    gguf: str
    model_type: str
    published_params: float
    dimensions: Mapping[str, Any]
    own: Mixture | None = None
    """What its files have, where nobody makes others."""


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
    Release("LFM2-8B-A1B", "lfm2moe", "lfm2_moe", 8.3e9, {
        "num_hidden_layers": 24, "layer_types": [
            "full_attention" if layer in (2, 6, 10, 14, 18, 21) else "conv" for layer in range(24)]}),
    Release("Mellum2-12B-A2.5B", "mellum", "mellum", 12.1e9, {}),
    Release("Qwen1.5-MoE-A2.7B", "qwen2moe", "qwen2_moe", 14.3e9, {
        **_gqa(24, 2048, 16, 16, 128, 151936), **_experts(60, 4, 1408, shared_expert_intermediate_size=5632)}),
    Release("DeepSeek-V2-Lite", "deepseek2", "deepseek_v2", 15.7e9, {
        **_mla(27, 2048, 16, None, 102400), **_routed(64, 6, 1408, 2, 1, 10944)}),
    Release("Ling-mini-2.0", "bailingmoe2", "sarvam_moe", 16.3e9, {
        **_gqa(20, 2048, 16, 4, 128, 157184), **_routed(256, 8, 512, 1, 1, 5120)}),
    Release("ERNIE-4.5-21B-A3B", "ernie4_5-moe", "ernie4_5_moe", 21.8e9, {
        **_gqa(28, 2560, 20, 4, 128, 103424), **_ernie(64, 6, 1536, 2, 1, 28, 12288)}),
    Release("gpt-oss-20b", "gpt-oss", "gpt_oss", 20.9e9, {
        **_gqa(24, 2880, 64, 8, 64, 201088), "num_local_experts": 32, "num_experts_per_tok": 4,
        "intermediate_size": 2880}, MXFP4_FILE),
    Release("GLM-4.7-Flash", "deepseek2", "deepseek_v3", 29.9e9, {
        **_mla(47, 2048, 20, 768, 154880), **_routed(64, 4, 1536, 1, 1, 10240), "qk_nope_head_dim": 192,
        "v_head_dim": 256}),
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
    Release("gpt-oss-120b", "gpt-oss", "gpt_oss", 116.8e9, {
        **_gqa(36, 2880, 64, 8, 64, 201088), "num_local_experts": 128, "num_experts_per_tok": 4,
        "intermediate_size": 2880}, MXFP4_FILE),
    Release("Hunyuan-A13B", "hunyuan-moe", "hunyuan_v1_moe", 80.4e9, {
        **_gqa(32, 4096, 32, 8, 128, 128167), "num_experts": 64, "moe_topk": 8, "intermediate_size": 3072,
        "tie_word_embeddings": True}),
    Release("Solar-Open-100B", "glm4moe", "glm4_moe", 102.6e9, {
        **_gqa(48, 4096, 64, 8, 128, 196608), **_routed(128, 8, 1280, 1, 0, 10240)}),
    Release("GLM-4.5-Air", "glm4moe", "glm4_moe", 106e9, {
        **_gqa(46, 4096, 96, 8, 128, 151552), **_routed(128, 8, 1408, 1, 1, 10944)}),
    Release("Mixtral-8x22B", "llama", "mixtral", 140.6e9, {
        **_gqa(56, 6144, 48, 8, 128, 32768), "num_local_experts": 8, "num_experts_per_tok": 2,
        "intermediate_size": 16384}),
    Release("dots.llm1", "dots1", "dots1", 142.8e9, {
        **_gqa(62, 4096, 32, 32, 128, 152064), **_routed(128, 6, 1408, 2, 1, 10944)}),
    Release("Step-3.5-Flash", "step35", "step3p5", 196e9, {
        "vocab_size": 128896, "num_sliding_attention_heads": 96, "sliding_window": 512,
        "layer_types": (["full_attention"] + ["sliding_attention"] * 3) * 11 + ["full_attention"]}),
    Release("MiniMax-M2", "minimax-m2", "minimax_m2", 230e9, {
        **_gqa(62, 3072, 48, 8, 128, 200064), "num_local_experts": 256, "num_experts_per_tok": 8,
        "intermediate_size": 1536}),
    Release("Qwen3-235B-A22B", "qwen3moe", "qwen3_moe", 235e9, {
        **_gqa(94, 4096, 64, 4, 128, 151936), **_experts(128, 8, 1536)}),
    Release("DeepSeek-V2", "deepseek2", "deepseek_v2", 236e9, {
        **_mla(60, 5120, 128, 1536, 102400), **_routed(160, 6, 1536, 2, 1, 12288)}),
    Release("DeepSeek-V4-Flash", "deepseek4", "deepseek_v4", 284e9, {}, MXFP4_FILE),
    Release("Hy3", "hy_v3", "hy_v3", 295e9, {}),
    Release("ERNIE-4.5-300B-A47B", "ernie4_5-moe", "ernie4_5_moe", 300e9, {
        **_gqa(54, 8192, 64, 8, 128, 103424), **_ernie(64, 8, 3584, 0, 3, 54, 28672)}),
    Release("MiniMax-M3", "minimax-m3", "minimax_m3_vl_text", 428e9, {
        "layer_types": ["full_attention"] * 3 + ["minimax_m3_sparse"] * 57,
        "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 57}),
    Release("GLM-4.5", "glm4moe", "glm4_moe", 355e9, {
        **_gqa(92, 5120, 96, 8, 128, 151552), **_routed(160, 8, 1536, 1, 3, 12288)}),
    Release("DeepSeek-V3, R1", "deepseek2", "deepseek_v3", 671e9, {
        **_mla(61, 7168, 128, 1536, 129280), **_routed(256, 8, 2048, 1, 3, 18432)}),
    Release("DeepSeek-V3.2", "deepseek32", "deepseek_v32", 671.9e9, {}),
    Release("GLM-5", "glm-dsa", "glm_moe_dsa", 744e9, {}),
    Release("Kimi-K2", "deepseek2", "deepseek_v3", 1.03e12, {
        **_mla(61, 7168, 64, 1536, 163840), **_routed(384, 8, 2048, 1, 1, 18432)}),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes unless the name says otherwise; see the columns of docs/models.md."""

    params: int
    file: int
    host_alone: int
    """Where everything is computed on the CPU: the file's pages, or a padded copy of experts instead of theirs."""
    host_beside_gpu: int
    """Experts beside a GPU, which reads the file's pages also where the CPU has a padded copy."""
    read_per_token: int
    """Expert weights that one token uses."""
    needs: CardNeeds
    """Of a card that holds all that is dense."""

    @property
    def dense(self) -> int:
        """On the card: packed matrices and floats."""
        return self.needs.dense_bytes

    @property
    def kv_cache(self) -> int:
        """Of `CONTEXT_TOKENS` in bfloat16, once it has grown; with linear attention's states."""
        kept = self.needs.kept
        numbers = sum(each.keys + each.values for each in kept)
        return 2 * CONTEXT_TOKENS * numbers + sum(each.state_bytes for each in kept)

    @property
    def gpu_least(self) -> int:
        """A card that holds everything but slots."""
        return self.needs.num_bytes(CONTEXT_TOKENS)

    def plan(self, card_bytes: int) -> MemoryPlan:
        """Where the memory of a card goes of which all is free."""
        most = {"most_tokens": CONTEXT_TOKENS, "context_tokens": CONTEXT_TOKENS}
        return plan_card(_GPU, card_bytes, self.needs, size=CacheSize(), refuses=False, **most)

    def share(self, card_bytes: int) -> float | None:
        """How many of all experts have room on a card; None where not even the rest has."""
        plan = self.plan(card_bytes)
        return plan.expert_share if plan.fits else None


def build(release: Release) -> nn.Module:
    """Return the model without weights."""
    from transformers import AutoConfig

    with torch.device("meta"):
        model: nn.Module = language_model(AutoConfig.for_model(release.model_type, **release.dimensions))
    return model


@functools.cache
def memory(release: Release, mixture: Mixture | None = None) -> Memory:
    """Compute one model's row, by default of its own files, or of Q4_K_M."""
    model, mixture = build(release), mixture or release.own or Q4_K_M
    config: Any = model.config
    routed = [module for name, module in model.named_modules() if name.endswith(".experts")]
    params = sum(parameter.numel() for parameter in model.parameters())
    top_k = int(config.num_experts_per_tok)
    layers = [_layer(number, module, top_k, mixture) for number, module in enumerate(routed)]
    experts = sum(layer.num_experts * layer.expert_bytes for layer in layers)
    dense = list(_dense(model, config, mixture))
    dense_file = sum(_file_bytes(each) for each in dense)
    return Memory(
        params=params,
        file=experts + dense_file,
        host_alone=sum(host_expert_bytes(layer, transfers=False) for layer in layers) + dense_file,
        host_beside_gpu=sum(host_expert_bytes(layer, transfers=True) for layer in layers),
        read_per_token=sum(layer.top_k * layer.expert_bytes for layer in layers),
        needs=card_needs(
            config, dense, layers, _GPU, ExpertOptions(), dtype=torch.bfloat16, gpu=_EveryType, capability=(8, 0),
            context_bytes=CONTEXT_BYTES, library_bytes=LIBRARY_BYTES,
        ),
    )  # fmt: skip


def _dense(model: nn.Module, config: Any, mixture: Mixture) -> Iterator[DenseTensor]:
    """Everything but routed experts, where a GPU has it: in host memory only an embedding that is looked up."""
    is_tied, packed = bool(config.tie_word_embeddings), set[int]()
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            packed.add(id(module.weight))
            if not is_tied:
                yield _matrix(f"{name}.weight", mixture.embedding, *module.weight.shape, where=HOST)
        elif isinstance(module, nn.Linear) and _PACKED.search(name):
            packed.add(id(module.weight))
            yield from _linear(name, module, config, mixture)
    for name, parameter in model.named_parameters():
        if id(parameter) not in packed and ".experts." not in name:
            yield DenseTensor(name, BF16, 1, parameter.numel(), _GPU, is_packed=False)


def _linear(name: str, module: nn.Linear, config: Any, mixture: Mixture) -> Iterator[DenseTensor]:
    rows, columns = module.weight.shape
    if name.endswith("kv_b_proj"):
        heads, rank = int(config.num_attention_heads), int(config.kv_lora_rank)
        yield _matrix(f"{name} k_b", Q8_0, heads * rank, int(config.qk_nope_head_dim))
        yield _matrix(f"{name} v_b", Q8_0, heads * int(config.v_head_dim), rank)
        return
    layer = _LAYER.search(name)
    more = layer is not None and int(layer[1]) % 2 and name.endswith(("v_proj", "down_proj"))
    kind = mixture.head if layer is None else mixture.dense_more if more else mixture.dense
    yield _matrix(name, mixture.fused if "in_proj_qkv" in name else kind, rows, columns)


def _matrix(name: str, kind: int, rows: int, columns: int, where: str = _GPU) -> DenseTensor:
    return DenseTensor(name, _as_wide(kind, columns), rows, columns, where)


def _as_wide(kind: int, columns: int) -> int:
    return kind if columns % TYPES[kind].block_values == 0 else _NARROW[kind]


def _file_bytes(tensor: DenseTensor) -> int:
    return tensor.rows * row_bytes(tensor.ggml_type if tensor.is_packed else F32, tensor.columns)


def _layer(number: int, module: Any, top_k: int, mixture: Mixture) -> LayerExperts:
    """One layer's experts as this program would load them."""
    count = module.num_experts
    hidden = module.hidden_dim if hasattr(module, "hidden_dim") else module.hidden_size
    width = module.intermediate_dim if hasattr(module, "intermediate_dim") else module.intermediate_size

    def matrix(kind: int, rows: int, columns: int) -> ExpertMatrix:
        kind = _as_wide(kind, columns)
        data = torch.empty((count, rows * row_bytes(kind, columns)), dtype=torch.uint8, device="meta")
        return ExpertMatrix(data, kind, rows, columns)

    gate, up = matrix(mixture.gate_up, width, hidden), matrix(mixture.gate_up, width, hidden)
    down = matrix(mixture.down[number % 2], hidden, width)
    made = LayerExperts(number, count, top_k, hidden, width, gate, up, down)
    if not hasattr(module, "gate_up_proj_bias"):
        return made
    rows = (torch.empty((count, 4 * m.rows), dtype=torch.uint8, device="meta") for m in made.matrices)
    biases = tuple(ExpertMatrix(data, F32, 1, m.rows) for data, m in zip(rows, made.matrices, strict=True))
    return replace(made, biases=biases, form=ExpertForm(has_biases=True))


def long_table() -> str:
    """Every model with every column, for docs/models.md."""
    heads = ["model", "parameters, 10⁹", "file", "read per token", "RAM, CPU only", "RAM beside a GPU"]
    rows = []
    for release in RELEASES:
        m = memory(release)
        sizes = (m.file, m.read_per_token, m.host_alone, m.host_beside_gpu, m.dense, m.kv_cache)
        few = ["", ""]
        if m.params > BIG_PARAMS and release.own is None:
            small = memory(release, TWO_BITS)
            few = [_size(small.file), _share(small, CARDS_GIB[-1])]
        rows.append([release.name, f"{m.params / 1e9:.1f}", *map(_size, sizes), *_shares(m), *few])
    heads += ["dense", "KV cache", *_CARD_HEADS, "2-bit file", f"its share in {CARDS_GIB[-1]} GiB"]
    return _markdown(heads, rows)


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
    "gpt-oss-120b", "GLM-4.5-Air", "Qwen3-235B-A22B", "DeepSeek-V3, R1",
)  # fmt: skip
_CARD_HEADS = [f"in {card} GiB" for card in CARDS_GIB]


def _shares(m: Memory) -> list[str]:
    return [_share(m, card) for card in CARDS_GIB]


def _share(m: Memory, card_gib: int) -> str:
    """Of the experts; "none" where a layer gets no slot, "-" where the card is too small for the rest."""
    share = m.share(card_gib * GIB)
    return "-" if share is None else {0.0: "none", 1.0: "all"}.get(share, f"{share:.0%}")


def _size(num_bytes: float) -> str:
    """In GiB, two figures or all before the point."""
    gib = num_bytes / GIB
    return f"{gib:.0f}" if gib >= 99.5 else f"{gib:.1f}" if gib >= 0.95 else f"{gib:.2f}"


def _markdown(heads: list[str], rows: list[list[str]]) -> str:
    assert {len(row) for row in rows} == {len(heads)}
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
