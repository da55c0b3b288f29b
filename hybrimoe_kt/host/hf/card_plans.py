"""Plans of the cards that a model is about to be loaded on, from what the rules made of it on the meta device."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from hybrimoe_kt.accelerators import is_host, numbered
from hybrimoe_kt.backends import decode_attention
from hybrimoe_kt.backends.gpu_dense import workspace_bytes
from hybrimoe_kt.backends.registry import cpu_backend, gpu_class
from hybrimoe_kt.config import ExpertOptions
from hybrimoe_kt.core.memory_plan import CONTEXT_BYTES, LIBRARY_BYTES, MemoryPlan, plan_card
from hybrimoe_kt.device.accelerator import Accelerator
from hybrimoe_kt.device.backend import GpuBackend
from hybrimoe_kt.device.choose import choose_accelerator
from hybrimoe_kt.device.packed import PackedMatrix
from hybrimoe_kt.host.card_plan import HOST, DenseTensor, card_needs, check_kv_widths, kept_widths
from hybrimoe_kt.kv_cache_types import KV_CACHE_TYPES
from hybrimoe_kt.quants import TYPES
from hybrimoe_kt.runtime import ModelExperts

from .architectures import Architecture
from .placement import Placement
from .sources import Source

__all__ = ["Card", "Context", "cards_of", "dense_tensors", "plan_cards", "plan_model"]

_BLOCK = re.compile(r"blk\.(\d+)\.")
_ASSUMED = 8, 0
"""Whose launch shapes size the workspace where a device does not say what it is."""
_NUMBERS = {kind.dtype: kind.number for kind in TYPES.values() if kind.dtype} | {"float16": 1}
"""torch's name of a dtype -> GGML's number."""


class Context(NamedTuple):
    """What a conversation is planned with: its tokens (None: the default), how they are kept, and the model's dtype."""

    tokens: int | None
    kv_cache_type: str
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Card:
    """What a plan has to know of an accelerator."""

    name: str
    device: torch.device
    free_bytes: int
    gpu: type[GpuBackend]
    """Who computes experts on it."""
    capability: tuple[int, int] | str = _ASSUMED
    """As `GpuBackend.kernels` takes it."""
    refuses: bool = True

    def holds(self, place: str, placement: Placement) -> bool:
        """Whether what stands on `place` takes its memory."""
        if self.device.type == "cpu":
            return place in (self.name, f"{self.name}:0") or (place == "cpu" and not placement.is_split)
        spot = numbered(place)
        return spot is not None and spot.torch_type != "cpu" and torch.device(place) == self.device

    def size(self, card_bytes: int) -> tuple[int, int, int]:
        """What may be taken, and of that what CUDA's context and libraries do; `card_bytes` as of the options."""
        is_real = self.device.type != "cpu"
        if not card_bytes:
            return self.free_bytes, 0, LIBRARY_BYTES if is_real else 0
        size = min(card_bytes, self.free_bytes + CONTEXT_BYTES) if is_real else card_bytes
        return size, CONTEXT_BYTES, LIBRARY_BYTES


def dense_tensors(
    packed: Mapping[str, PackedMatrix],
    parameters: Mapping[str, tuple[int, ...]],
    placement: Placement,
    architecture: Architecture,
    config: Any,
    dtype: torch.dtype,
) -> Iterator[DenseTensor]:
    """Describe `packed` (the file's name -> matrix) and the floats (parameter -> shape), where `placement` has them.

    An embedding that is only looked up stays in host memory. Of up-projections that the file has as one, the half for
    keys becomes floats.
    """
    is_tied = "output.weight" not in packed and "lm_head.weight" not in parameters
    floats = _NUMBERS[str(dtype).removeprefix("torch.")]
    for name, matrix in packed.items():
        where, rows = _place_of_tensor(name, placement, is_tied=is_tied), matrix.heads * matrix.rows
        if name.endswith(".attn_kv_b.weight"):
            keys = int(config.num_attention_heads * config.qk_nope_head_dim)
            yield DenseTensor(f"{name} (keys)", floats, keys, matrix.columns, where, is_packed=False)
            rows -= keys
        yield DenseTensor(name, matrix.ggml_type, rows, matrix.columns, where)
    for name, shape in parameters.items():
        kind = _NUMBERS["float32"] if name.endswith(architecture.float32) else floats
        yield DenseTensor(name, kind, 1, torch.Size(shape).numel(), placement.place_of(name), is_packed=False)


def _place_of_tensor(name: str, placement: Placement, *, is_tied: bool) -> str:
    if name == "token_embd.weight" and not is_tied:
        return HOST
    block = _BLOCK.match(name)
    return placement.place_of(f"model.layers.{block[1]}.weight" if block else "lm_head.weight")


def cards_of(experts: ModelExperts, placement: Placement) -> dict[str, Card]:
    """Return the accelerators that experts name, by that name, and others that layers stand on, as they are now."""
    cards: dict[str, Card] = {}
    for name in dict.fromkeys(experts.accelerator_of.values()):
        device = choose_accelerator(name)
        if device is not None:
            cards[name] = _card(device, experts.options)
    for place in dict.fromkeys(placement.places.values()):
        is_known = is_host(place) or any(card.holds(place, placement) for card in cards.values())
        device = None if is_known or numbered(place) is None else choose_accelerator(place)
        if device is not None:
            cards[place] = _card(device, experts.options)
    return cards


def _card(device: Accelerator, options: ExpertOptions) -> Card:
    return Card(
        device.name,
        device.device,
        device.auto_budget_bytes(0),
        gpu_class(options.gpu_backend, device.device),
        _capability(device.device),
        refuses=device.device.type != "cpu" or bool(options.card_bytes),
    )


def plan_model(
    source: Source,
    experts: ModelExperts,
    placement: Placement,
    parameters: Mapping[str, tuple[int, ...]],
    context: Context,
    cards: Mapping[str, Card] | None = None,
    *,
    attention: Collection[str] = (),
) -> dict[str, MemoryPlan]:
    """Plan what the rules made of a model without weights: `parameters` are its floats, the loader has what is packed.

    On the accelerators that experts name and layers stand on, unless `cards` are given. `attention`: by what kernels.
    """
    packed, config = source.loader.packed, source.config
    dense = dense_tensors(packed, parameters, placement, source.architecture, config, context.dtype)
    cards = cards_of(experts, placement) if cards is None else cards
    has_kernels = packed and any(card.device.type != "cpu" for card in cards.values())
    width = max(_heads_of(matrix, config) * matrix.columns for matrix in packed.values()) if has_kernels else 0
    linear_bytes = workspace_bytes(width, context.dtype) if width else 0
    return plan_cards(
        cards, experts, list(dense), placement, config, context, linear_bytes=linear_bytes, attention=attention
    )


def _heads_of(matrix: PackedMatrix, config: Any) -> int:
    """Of the input that a matrix is multiplied with."""
    return int(config.num_attention_heads) if ".attn_kv_b." in matrix.name else matrix.heads


def plan_cards(
    cards: Mapping[str, Card],
    experts: ModelExperts,
    dense: Sequence[DenseTensor],
    placement: Placement,
    config: Any,
    context: Context,
    *,
    linear_bytes: int = 0,
    attention: Collection[str] = (),
) -> dict[str, MemoryPlan]:
    """Plan every card, by its accelerator's name; CapacityError where one that refuses cannot hold what it has to.

    An emulated one stands for a card: what is on the CPU counts as if it stood there. `linear_bytes`: workspace of the
    kernels for packed matrices, where there are any; `attention` as of `plan_model`.
    """
    options, plans, places = experts.options, {}, {each.where for each in dense}
    for name, card in cards.items():
        if card.device.type != "cpu":  # else ggml may keep them, which looks for itself
            check_kv_widths(config, context.kv_cache_type)
        here = {place for place in places if card.holds(place, placement)}
        size, context_bytes, library_bytes = card.size(options.card_bytes)
        needs = card_needs(
            config,
            [each._replace(where=name) if each.where in here else each for each in dense],
            [experts.store.layers[number] for number, own in experts.accelerator_of.items() if own == name],
            name,
            options,
            dtype=context.dtype,
            gpu=card.gpu,
            capability=card.capability,
            layers=[number for number in range(config.num_hidden_layers) if _layer_place(number, placement) in here],
            kv_cache_type=context.kv_cache_type,
            cpu_answers_pairs=cpu_backend(options.cpu_backend).answers_pairs,
            linear_bytes=linear_bytes,
            attention_bytes=max(
                (_attention_bytes(card.device, each, config, context) for each in attention), default=0
            ),
            context_bytes=context_bytes,
            library_bytes=library_bytes,
        )
        most = int(config.max_position_embeddings)
        plans[name] = plan_card(
            card.name, size, needs, size=options.cache_size, most_tokens=most, context_tokens=context.tokens,
            refuses=card.refuses,
        )  # fmt: skip
    return plans


def _attention_bytes(device: torch.device, kernel: str, config: Any, context: Context) -> int:
    kept = KV_CACHE_TYPES[context.kv_cache_type].dtype  # blocks are read as floats of the model's dtype
    return decode_attention.workspace_bytes(
        device,
        kernel,
        kept_widths(config),
        context.dtype,
        getattr(torch, kept) if kept else context.dtype,
        is_latent=bool(getattr(config, "kv_lora_rank", None)),
    )


def _layer_place(number: int, placement: Placement) -> str:
    return placement.place_of(f"model.layers.{number}.weight")


def _capability(device: torch.device) -> tuple[int, int] | str:
    if device.type != "cuda":
        return _ASSUMED
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName)
    return torch.cuda.get_device_capability(device)
