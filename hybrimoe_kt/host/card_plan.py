"""From a model's configuration, its dense tensors and its experts to what it takes of a card."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import torch

from hybrimoe_kt.config import ExpertOptions
from hybrimoe_kt.core.card_needs import CardNeeds, Kept
from hybrimoe_kt.core.step_memory import StepShape
from hybrimoe_kt.device.backend import GpuBackend
from hybrimoe_kt.device.experts import LayerExperts
from hybrimoe_kt.device.lane_memory import lane_bytes
from hybrimoe_kt.device.layout import MatrixLayout, SlotLayout
from hybrimoe_kt.errors import ConfigError
from hybrimoe_kt.kv_cache_types import BLOCK_VALUES, KV_CACHE_TYPES, check_kv_cache_type

__all__ = [
    "HOST",
    "DenseTensor",
    "card_needs",
    "check_kv_widths",
    "dense_bytes",
    "kept_of",
    "kept_widths",
    "step_shape",
]

HOST = "host"
"""The place of what is read in host memory whatever computes: an embedding that is only looked up."""
_ALLOCATED_BYTES = 512
"""What torch's allocator rounds a tensor's size up to."""


class DenseTensor(NamedTuple):
    """One dense tensor `[rows, columns]` as it will lie in memory."""

    name: str
    ggml_type: int
    """Of packed blocks, or of floats: F32, F16, BF16."""
    rows: int
    columns: int
    where: str
    """The place it stands on: a device's name, an emulated accelerator's, "cpu", or `HOST`."""
    group: str = ""
    """Packed matrices of one group and type are laid out as one, one above the other."""
    is_packed: bool = True


def dense_bytes(tensors: Iterable[DenseTensor], where: str) -> tuple[int, int]:
    """Return what packed matrices and floats take on one place, alignment included."""
    packed: dict[tuple[str, int, int], int] = {}
    floats = 0
    for each in tensors:
        if each.where != where:
            continue
        if each.is_packed:
            key = (each.group or each.name, each.ggml_type, each.columns)
            packed[key] = packed.get(key, 0) + each.rows
        else:
            end = MatrixLayout.at(0, each.ggml_type, each.rows, each.columns).end_bytes
            floats += -(-end // _ALLOCATED_BYTES) * _ALLOCATED_BYTES
    stacked = (MatrixLayout.at(0, kind, rows, columns) for (_, kind, columns), rows in packed.items())
    return sum(layout.end_bytes for layout in stacked), floats


def kept_of(config: Any, dtype_bytes: int) -> list[Kept]:
    """Return what each layer keeps of a conversation, from a Transformers configuration.

    A layer with a window counts as if it kept all tokens.
    """
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    if getattr(config, "kv_lora_rank", None):
        indexed = int(getattr(config, "index_head_dim", None) or 0)
        each: Kept | None = Kept(int(config.kv_lora_rank) + indexed, int(config.qk_rope_head_dim))
    else:
        each = None
    states = {"linear_attention": _state, "conv": _convolved, "moe": _nothing, "mlp": _nothing}
    return [
        states[kind](config, dtype_bytes) if kind in states else each or _keys_and_values(config, layer)
        for layer, kind in enumerate(kinds)
    ]


def _keys_and_values(config: Any, layer: int) -> Kept:
    """A layer's, where some have other heads than the rest, too."""
    own = _config_of(config, layer)
    width = int(own.num_key_value_heads) * _head_dim(own)
    kinds = getattr(config, "layer_types", None) or []
    indexed = int(own.index_head_dim) if kinds and kinds[layer] == "minimax_m3_sparse" else 0
    return Kept(width + indexed, width)


def _config_of(config: Any, layer: int) -> Any:
    """The model's, or a layer's own where layers differ."""
    return config.per_layer_config[layer] if getattr(config, "per_layer_config", None) else config


def _nothing(config: Any, dtype_bytes: int) -> Kept:
    """A layer of experts alone."""
    return Kept()


def _convolved(config: Any, dtype_bytes: int) -> Kept:
    """A short convolution's: the last columns of what enters it."""
    return Kept(state_bytes=int(config.hidden_size) * int(config.conv_L_cache) * dtype_bytes)


def _state(config: Any, dtype_bytes: int) -> Kept:
    """Linear attention's: the last columns of its convolution, and a float32 matrix for each head of values."""
    if heads := _first(config, ("mamba_num_heads", "mamba_n_heads")):  # a state space's
        inner = heads * _first(config, ("mamba_head_dim", "mamba_d_head"))
        width = _first(config, ("ssm_state_size", "mamba_d_state"))
        columns = inner + 2 * _first(config, ("n_groups", "mamba_n_groups")) * width
        convolved = columns * _first(config, ("conv_kernel", "mamba_d_conv")) * dtype_bytes
        return Kept(state_bytes=convolved + 4 * inner * width)
    if heads := _first(config, ("linear_num_heads",)):  # as many of keys as of values
        inner, width = int(heads * config.linear_head_dim), int(config.linear_head_dim)
        return Kept(state_bytes=3 * inner * int(config.linear_conv_kernel_dim) * dtype_bytes + 4 * inner * width)
    keys = int(config.linear_num_key_heads * config.linear_key_head_dim)
    values = int(config.linear_num_value_heads * config.linear_value_head_dim)
    convolved = (2 * keys + values) * int(config.linear_conv_kernel_dim) * dtype_bytes
    return Kept(state_bytes=convolved + 4 * values * int(config.linear_key_head_dim))


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _widest_head(config: Any) -> int:
    return max(_head_dim(_config_of(config, layer)) for layer in range(config.num_hidden_layers))


def kept_widths(config: Any) -> tuple[int, int]:
    """Return how wide a head's keys and values are, or latents and their rotated part."""
    latent = getattr(config, "kv_lora_rank", None)
    return (int(latent), int(config.qk_rope_head_dim)) if latent else (_widest_head(config),) * 2


def check_kv_widths(config: Any, kv_cache_type: str) -> None:
    """ConfigError where keys and values cannot be kept in the type: unknown, or heads that are no whole blocks."""
    check_kv_cache_type(kv_cache_type)
    if kv_cache_type != "q8_0":
        return
    if odd := sorted(width for width in kept_widths(config) if width % BLOCK_VALUES):
        raise ConfigError(
            f"kv_cache_type q8_0 takes heads a multiple of {BLOCK_VALUES} wide, these are {odd[0]}; take another"
        )


_SHARED_WIDTHS = "shared_expert_intermediate_size", "shared_intermediate_size", "share_expert_dim"
_SHARED_COUNTS = "n_shared_experts", "moe_num_shared_experts", "num_shared_experts"
"""What families call how wide shared experts are together, and how many of an expert's width there are."""


def step_shape(config: Any, chunk_tokens: int, dtype_bytes: int, *, converts_cache: bool = False) -> StepShape:
    """Return the widths of a model's widest layers; `converts_cache`: keys and values are kept in another dtype."""
    own = [_config_of(config, layer) for layer in range(config.num_hidden_layers)]
    heads, latent = max(int(each.num_attention_heads) for each in own), getattr(config, "kv_lora_rank", None)
    kept = max((each.keys + each.values for each in kept_of(config, dtype_bytes)), default=0)
    if latent:
        query = int(config.qk_nope_head_dim + config.qk_rope_head_dim) + int(config.v_head_dim)
        attention = {"projected": heads * (query + 2 * int(latent)) + kept, "scores": heads}
    else:
        fewest = min(int(each.num_key_value_heads) for each in own)
        query, grouped = heads * _widest_head(config), heads > fewest
        attention = {"projected": 2 * query + kept, "repeated": 2 * query if grouped else 0}
    shared, counted = _first(config, _SHARED_WIDTHS), _first(config, _SHARED_COUNTS)
    widths = (_first(config, ("intermediate_size",)), shared, counted * _expert_width(config))
    linear_heads = int(getattr(config, "linear_num_value_heads", None) or 0)
    head_width = max(getattr(config, f"linear_{name}_head_dim", None) or 0 for name in ("key", "value"))
    return StepShape(
        chunk_tokens=chunk_tokens,
        value_bytes=dtype_bytes,
        hidden=int(config.hidden_size),
        vocabulary=int(config.vocab_size),
        handed_out=kept if converts_cache else 0,
        feed_forward=max(widths),
        linear=linear_heads * int(head_width),
        linear_heads=linear_heads,
        **attention,
    )


def _first(config: Any, names: Iterable[str]) -> int:
    """The first of these numbers that is there; 0 where none is."""
    return int(next((found for name in names if (found := getattr(config, name, None))), 0))


def _expert_width(config: Any) -> int:
    return _first(config, ("moe_intermediate_size",))


def card_needs(
    config: Any,
    dense: Iterable[DenseTensor],
    experts: Collection[LayerExperts],
    where: str,
    options: ExpertOptions,
    *,
    dtype: torch.dtype,
    gpu: type[GpuBackend],
    capability: tuple[int, int] | str,
    layers: Collection[int] | None = None,
    kv_cache_type: str = "auto",
    cpu_answers_pairs: bool = False,
    linear_bytes: int = 0,
    attention_bytes: int = 0,
    context_bytes: int = 0,
    library_bytes: int = 0,
) -> CardNeeds:
    """Return what the place `where` has to hold: `dense` as far as it stands there, and slots for `experts`.

    `layers` have their dense part there, and so their keys and values; None: all. `experts` may lie on the meta device.
    """
    kind, dtype_bytes = KV_CACHE_TYPES[kv_cache_type], dtype.itemsize
    numbers = range(config.num_hidden_layers) if layers is None else layers
    kept = kept_of(config, dtype_bytes)
    converts = kv_cache_type != "auto" and kind.dtype != str(dtype).removeprefix("torch.")
    chunk = options.max_chunk_tokens
    served = [each for each in experts if gpu.refuses(each) is None]
    packed, floats = dense_bytes(dense, where)
    workspace = max((gpu.planned_bytes(each, chunk, capability) for each in served), default=0)
    buffers = lane_bytes(
        served, chunk, gpu_answers_pairs=gpu.answers_pairs, cpu_answers_pairs=cpu_answers_pairs
    )  # fmt: skip
    return CardNeeds(
        packed_bytes=packed,
        float_bytes=floats,
        kept=tuple(kept[number] for number in numbers),
        cache_value_bytes=kind.value_bytes or dtype_bytes,
        step=step_shape(config, chunk, dtype_bytes, converts_cache=converts) if numbers else None,
        expert_bytes=workspace + buffers,
        linear_bytes=linear_bytes,
        attention_bytes=attention_bytes if numbers else 0,
        streaming_bytes=options.prefill_streaming_bytes if served else 0,
        context_bytes=context_bytes,
        library_bytes=library_bytes,
        reserve_bytes=options.reserve_bytes,
        slot_bytes={each.layer: SlotLayout(each).slot_bytes for each in served},
        num_experts={each.layer: each.num_experts for each in served},
        all_experts=sum(each.num_experts for each in experts),
    )
