"""Plans of the cards that a model is about to be loaded on, from what the rules made of it on the meta device."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from hybrimoe_kt.accelerators import numbered
from hybrimoe_kt.backends.registry import cpu_backend, gpu_class
from hybrimoe_kt.config import ExpertOptions
from hybrimoe_kt.core.memory_plan import CONTEXT_BYTES, LIBRARY_BYTES, MemoryPlan, plan_card
from hybrimoe_kt.device.accelerator import Accelerator
from hybrimoe_kt.device.choose import choose_accelerator
from hybrimoe_kt.device.packed import PackedMatrix
from hybrimoe_kt.host.card_plan import DenseTensor, card_needs
from hybrimoe_kt.quants import TYPES
from hybrimoe_kt.runtime import ModelExperts

from .architectures import Architecture
from .placement import Placement

__all__ = ["Context", "dense_tensors", "plan_cards"]

_BLOCK = re.compile(r"blk\.(\d+)\.")
_LAYER = re.compile(r"\.layers\.(\d+)\.")
_ASSUMED = 8, 0
"""Whose launch shapes size the workspace where a device does not say what it is."""
_NUMBERS = {kind.dtype: kind.number for kind in TYPES.values() if kind.dtype} | {"float16": 1}
"""torch's name of a dtype -> GGML's number."""


class Context(NamedTuple):
    """What a conversation is planned with: its tokens (None: the default), how they are kept, and the model's dtype."""

    tokens: int | None
    kv_cache_type: str
    dtype: torch.dtype


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
        return "cpu"
    block = _BLOCK.match(name)
    return placement.place_of(f"model.layers.{block[1]}.weight" if block else "lm_head.weight")


def plan_cards(
    experts: ModelExperts,
    dense: list[DenseTensor],
    placement: Placement,
    config: Any,
    context: Context,
    *,
    linear_bytes: int = 0,
) -> dict[str, MemoryPlan]:
    """Plan every accelerator that experts name, by that name; CapacityError where it cannot hold what it has to.

    An emulated one stands for a card: what is on the CPU counts as if it stood there. It refuses nothing unless it was
    given a size, `card_bytes`. `linear_bytes`: workspace of the kernels for packed matrices, where there are any.
    """
    options, plans = experts.options, {}
    for name in dict.fromkeys(experts.accelerator_of.values()):
        device = choose_accelerator(name)
        if device is None:
            continue
        here = {place for place in {each.where for each in dense} if _stands_on(place, device, placement)}
        layers = [n for n in range(config.num_hidden_layers) if _layer_place(n, placement) in here]
        served = [experts.store.layers[n] for n, own in experts.accelerator_of.items() if own == name]
        card_bytes, context_bytes, library_bytes = _size(device, options)
        needs = card_needs(
            config,
            [each._replace(where=name) if each.where in here else each for each in dense],
            served,
            name,
            options,
            dtype=context.dtype,
            gpu=gpu_class(options.gpu_backend, device.device),
            capability=_capability(device.device),
            layers=layers,
            kv_cache_type=context.kv_cache_type,
            cpu_answers_pairs=cpu_backend(options.cpu_backend).answers_pairs,
            linear_bytes=linear_bytes,
            context_bytes=context_bytes,
            library_bytes=library_bytes,
        )
        plans[name] = plan_card(
            device.name,
            card_bytes,
            needs,
            size=options.cache_size,
            most_tokens=int(config.max_position_embeddings),
            context_tokens=context.tokens,
            refuses=bool(options.card_bytes) or device.device.type != "cpu",
        )
    return plans


def _stands_on(place: str, device: Accelerator, placement: Placement) -> bool:
    if device.device.type != "cpu":
        spot = numbered(place)
        return spot is not None and spot.torch_type != "cpu" and torch.device(place) == device.device
    return place == device.name or (place == "cpu" and not placement.is_split)


def _layer_place(number: int, placement: Placement) -> str:
    return placement.place_of(f"model.layers.{number}.weight")


def _size(device: Accelerator, options: ExpertOptions) -> tuple[int, int, int]:
    """What may be taken, and of that what CUDA's context and libraries do."""
    is_real = device.device.type != "cpu"
    free = device.auto_budget_bytes(0)
    if not options.card_bytes:
        return free, 0, LIBRARY_BYTES if is_real else 0
    size = min(options.card_bytes, free + CONTEXT_BYTES) if is_real else options.card_bytes
    return size, CONTEXT_BYTES, LIBRARY_BYTES


def _capability(device: torch.device) -> tuple[int, int] | str:
    if device.type != "cuda":
        return _ASSUMED
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName)
    return torch.cuda.get_device_capability(device)
