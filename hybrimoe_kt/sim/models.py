"""Sizes of the models that can be simulated, from their published configurations."""

from __future__ import annotations

from dataclasses import dataclass

from hybrimoe_kt.errors import ConfigError, unknown_name

EXPERT_BITS = 4.0
"""Bits per expert parameter; the paper evaluates 4-bit experts and counts no scales."""
DENSE_BITS = 4.5
"""Bits per parameter of attention, shared experts and dense layers on the GPU: 4-bit blocks with their scales."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What replay needs to know of a model; counts are parameters unless the name says otherwise."""

    name: str
    moe_layers: tuple[int, ...]
    num_layers: int
    num_experts: int
    top_k: int
    hidden: int
    expert_width: int
    attention: int
    """Attention projections of one layer."""
    shared_width: int = 0
    """Width of all shared experts of one layer together."""
    dense_width: int = 0
    """Width of the FFN in the layers without experts."""
    vocabulary: int = 0

    @property
    def expert_params(self) -> int:
        return 3 * self.hidden * self.expert_width

    @property
    def expert_bytes(self) -> int:
        return int(self.expert_params * EXPERT_BITS / 8)

    @property
    def shared_params(self) -> int:
        return 3 * self.hidden * self.shared_width

    @property
    def dense_params(self) -> int:
        return 3 * self.hidden * self.dense_width

    @property
    def head_params(self) -> int:
        """The output projection, read once per token."""
        return self.hidden * self.vocabulary


def _gqa(hidden: int, heads: int, kv_heads: int, head_dim: int) -> int:
    """Parameters of grouped-query attention: query and output, key and value."""
    return 2 * hidden * heads * head_dim + 2 * hidden * kv_heads * head_dim


def _mla(hidden: int, heads: int, rank: int, nope: int, rope: int, value: int) -> int:
    """Parameters of DeepSeek's latent attention without query compression."""
    query, down = hidden * heads * (nope + rope), hidden * (rank + rope)
    return query + down + rank * heads * (nope + value) + heads * value * hidden


MODELS = {
    spec.name: spec
    for spec in (
        ModelSpec(
            "mixtral-8x7b", tuple(range(32)), 32, num_experts=8, top_k=2, hidden=4096, expert_width=14336,
            attention=_gqa(4096, 32, 8, 128), vocabulary=32000,
        ),
        ModelSpec(
            "qwen2-57b-a14b", tuple(range(28)), 28, num_experts=64, top_k=8, hidden=3584, expert_width=2560,
            attention=_gqa(3584, 28, 4, 128), shared_width=20480, vocabulary=151936,
        ),
        ModelSpec(
            "deepseek-v2-lite", tuple(range(1, 27)), 27, num_experts=64, top_k=6, hidden=2048, expert_width=1408,
            attention=_mla(2048, 16, 512, 128, 64, 128), shared_width=2816, dense_width=10944, vocabulary=102400,
        ),
        ModelSpec(
            "qwen3-30b-a3b", tuple(range(48)), 48, num_experts=128, top_k=8, hidden=2048, expert_width=768,
            attention=_gqa(2048, 32, 4, 128), vocabulary=151936,
        ),
    )
}  # fmt: skip
PAPER_MODELS = ("mixtral-8x7b", "qwen2-57b-a14b", "deepseek-v2-lite")


def find_model(name: str) -> ModelSpec:
    """Return the model's sizes, or say which names exist."""
    if name not in MODELS:
        raise ConfigError(unknown_name("model", name, MODELS))
    return MODELS[name]
