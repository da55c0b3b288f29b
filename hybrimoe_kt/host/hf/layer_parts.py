"""Reads a Transformers decoder layer as parts that graphs are made of: recipes by what modules have, not by model.

Only the classes in `_LAYERS` are read, as what a module does with its parts is code. What has something that no graph
here does is refused with the reason, and stays Transformers' own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hybrimoe_kt.backends.ggml.choice import Choice, choice_of
from hybrimoe_kt.backends.ggml.parts import (
    GroupedQuery,
    HeadParts,
    Latent,
    LayerParts,
    Matrix,
    Norm,
    Rotary,
    SharedExpert,
    Swiglu,
)
from hybrimoe_kt.backends.ggml.up_projections import FusedUpProjections, SplitUpProjections
from hybrimoe_kt.device.packed import PackedMatrix
from hybrimoe_kt.operators.attention_mla import AbsorbedMLA
from hybrimoe_kt.operators.experts import HybriMoEExperts
from hybrimoe_kt.operators.linear import QuantizedLinear
from hybrimoe_kt.operators.stored_layer import KeyLayout

from .architectures import Architecture
from .gates import Gate, logits_and_ids

__all__ = ["NotDescribed", "ReadLayer", "head_parts", "layer_parts"]

_TRIED = 64
"""Random states by which a router's choice is found out."""
_SILU = ("silu", "swish")
_GROUPS = ("num_group", "n_group")
_BEST_GROUPS = ("topk_group",)


@dataclass(frozen=True, slots=True)
class _Kind:
    """What a class of decoder layers does that its modules do not tell."""

    is_paired: bool = False
    """Whether neighbouring dimensions are rotated together; else the halves."""
    is_gated: bool = False
    """Whether queries come with gates on the answers."""


_LAYERS = {
    "MixtralDecoderLayer": _Kind(),
    "OlmoeDecoderLayer": _Kind(),
    "Qwen2MoeDecoderLayer": _Kind(),
    "Qwen3MoeDecoderLayer": _Kind(),
    "Qwen3NextDecoderLayer": _Kind(is_gated=True),
    "Qwen3_5MoeDecoderLayer": _Kind(is_gated=True),
    "GraniteMoeDecoderLayer": _Kind(),
    "MiniMaxM2DecoderLayer": _Kind(),
    "Glm4MoeDecoderLayer": _Kind(),
    "Ernie4_5_MoeDecoderLayer": _Kind(is_paired=True),
    "DeepseekV2DecoderLayer": _Kind(is_paired=True),
    "DeepseekV3DecoderLayer": _Kind(is_paired=True),
}


class NotDescribed(Exception):
    """A layer has something that no graph here does; says what."""


@dataclass(frozen=True, slots=True, eq=False)
class ReadLayer:
    """A layer as graphs and as caches take it."""

    parts: LayerParts
    layout: KeyLayout
    experts: HybriMoEExperts | None
    router: tuple[nn.Module, tuple[Any, ...]] | None


def layer_parts(layer: nn.Module, config: Any, rotary: nn.Module, family: Architecture) -> ReadLayer:
    """Read a decoder layer of a loaded model; NotDescribed where something is not known here."""
    name = type(layer).__name__
    kind = _LAYERS.get(name)
    if kind is None:
        raise NotDescribed(f"{name} is not known here")
    reader = _Reader(layer, config, rotary, family, kind)
    return reader.read()


def head_parts(model: nn.Module, family: Architecture) -> HeadParts:
    """Read what follows the last layer; NotDescribed as above."""
    causal: Any = model
    factor = 1.0 / float(getattr(causal.config, "logits_scaling", 1.0) or 1.0)
    return HeadParts(_norm(causal.model.norm, family.norm_offset), _matrix(causal.lm_head, "lm_head"), factor)


class _Reader:
    def __init__(self, layer: nn.Module, config: Any, rotary: nn.Module, family: Architecture, kind: _Kind) -> None:
        self._layer, self._config, self._family, self._kind = layer, config, family, kind
        self._stock_rotary = rotary

    def read(self) -> ReadLayer:
        layer: Any = self._layer
        if getattr(self._config, "hidden_act", "silu") not in _SILU:
            raise NotDescribed(f"its activation is {self._config.hidden_act}")
        attention: Any = getattr(layer, "self_attn", None)
        if attention is None:
            raise NotDescribed("its attention is linear")
        parts: GroupedQuery | Latent
        if isinstance(attention, AbsorbedMLA):
            parts, layout = self._latent(attention)
        elif hasattr(attention, "kv_b_proj"):
            raise NotDescribed("no rule gives its attention to AbsorbedMLA")
        else:
            parts, layout = self._grouped(attention)
        offset = self._family.norm_offset
        body: Any = layer.mlp if hasattr(layer, "mlp") else layer.block_sparse_moe
        experts = next((module for module in body.children() if isinstance(module, HybriMoEExperts)), None)
        norms = _norm(layer.input_layernorm, offset), _norm(layer.post_attention_layernorm, offset)
        factor = float(getattr(layer, "residual_multiplier", 1.0))
        if experts is None:
            if not hasattr(body, "gate_proj"):
                raise NotDescribed("no rule gives its experts to HybriMoEExperts")
            dense = _swiglu(body)
            return ReadLayer(LayerParts(norms[0], parts, norms[1], dense, residual_factor=factor), layout, None, None)
        router, further = self._router(body)
        made = LayerParts(
            norms[0],
            parts,
            norms[1],
            router=_float32(router.weight, "its router"),
            choice=_choice(router, further),
            shared=_shared(body),
            residual_factor=factor,
        )
        return ReadLayer(made, layout, experts, (router, further))

    def _router(self, body: Any) -> tuple[Any, tuple[Any, ...]]:
        router = body.gate if hasattr(body, "gate") else body.router
        return router, tuple(getattr(body, name) for name in self._family.router_inputs)

    # Attention.

    def _grouped(self, attention: Any) -> tuple[GroupedQuery, KeyLayout]:
        config = self._config
        if getattr(config, "clip_qkv", None) is not None:
            raise NotDescribed("it clips queries, keys and values")
        width, heads = int(attention.head_dim), int(config.num_attention_heads)
        kv_heads = int(config.num_key_value_heads)
        query, is_query_paired = _paired(attention.q_proj, heads)
        key, is_key_paired = _paired(attention.k_proj, kv_heads)
        norms = [
            _norm(norm, self._family.norm_offset) if norm is not None else None
            for norm in (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
        ]
        if is_query_paired != is_key_paired or (is_key_paired and any(norms)):
            raise NotDescribed("its queries and keys stand in different orders")
        rotary = self._rotary(is_paired=self._kind.is_paired or is_key_paired)
        parts = GroupedQuery(
            query,
            key,
            _matrix(attention.v_proj, "v_proj"),
            _matrix(attention.o_proj, "o_proj"),
            heads,
            kv_heads,
            width,
            float(attention.scaling),
            rotary,
            norms[0],
            norms[1],
            self._kind.is_gated,
            int(_window(attention, config) or 0),
            _optional(getattr(attention, "sinks", None)),
            float(getattr(config, "attn_logit_softcapping", None) or 0.0),
        )
        return parts, KeyLayout(kv_heads, order=_order(rotary.dims, width) if is_key_paired else None)

    def _latent(self, attention: AbsorbedMLA) -> tuple[Latent, KeyLayout]:
        heads, nope, value, rank = attention.num_heads, attention.nope, attention.value, attention.kv_lora_rank
        up = attention.up_projections
        stride = offset = 0
        if isinstance(up, SplitUpProjections):
            to_latent, to_value = up.keys, up.values
        elif isinstance(up, FusedUpProjections):
            to_latent, to_value, stride, offset = up.transposed_keys(), up.values, up.stride, up.offset
        else:
            floats = _float32(attention.kv_b_proj.weight, "kv_b_proj").view(heads, nope + value, rank)
            to_latent = _packed(floats[:, :nope].transpose(1, 2).contiguous(), "kv_b_proj")
            to_value = _packed(floats[:, nope:].contiguous(), "kv_b_proj")
        is_paired = bool(getattr(self._config, "rope_interleave", True))
        rotary = self._rotary(is_paired=is_paired)
        has_down = attention.q_a_proj is not None
        parts = Latent(
            _matrix(attention.q_b_proj if has_down else attention.q_proj, "q_proj"),
            _matrix(attention.q_a_proj, "q_a_proj") if has_down else None,
            _norm(attention.q_a_layernorm, 0.0) if has_down else None,
            _matrix(attention.kv_a_proj_with_mqa, "kv_a_proj_with_mqa"),
            _norm(attention.kv_a_layernorm, 0.0),
            to_latent,
            to_value,
            stride,
            offset,
            _matrix(attention.o_proj, "o_proj"),
            heads,
            rank,
            nope,
            value,
            attention.scaling,
            rotary,
        )
        moves = is_paired and not attention.keeps_pairs
        return parts, KeyLayout(1, rank, _order(rotary.dims, rotary.dims) if moves else None)

    def _rotary(self, *, is_paired: bool) -> Rotary:
        module: Any = self._stock_rotary
        frequencies = _float32(module.inv_freq, "its rotary positions")
        return Rotary(1.0 / frequencies, is_paired, float(module.attention_scaling))


def _order(dims: int, width: int) -> torch.Tensor:
    """Where each dimension of a head with pairs is in one with halves; those behind `dims` stay."""
    order = torch.arange(width, device="cpu")
    order[:dims] = order[:dims].view(2, -1).t().flatten()
    return order


def _window(attention: Any, config: Any) -> int | None:
    if hasattr(attention, "sliding_window"):
        found: int | None = attention.sliding_window
        return found
    return getattr(config, "sliding_window", None)


def _choice(router: Any, further: tuple[Any, ...]) -> Choice | None:
    """Ask a router about random states, and find the choice that answers alike."""
    gate = Gate(router, None, further)
    weight = gate.weight
    generator = torch.Generator(device="cpu").manual_seed(20250405)
    hidden = torch.randn(_TRIED, weight.shape[1], generator=generator).to(weight)
    hidden *= 2 / nn.functional.linear(hidden, weight).float().std().clamp_min(1e-6)
    with torch.no_grad():
        answer = router.forward(hidden, *further)
    logits, ids = logits_and_ids(answer)
    if not torch.allclose(nn.functional.linear(hidden, weight).float(), logits.float(), rtol=1e-3, atol=1e-4):
        return None
    return choice_of(
        logits.float(),
        answer[1],
        ids,
        factor=float(getattr(router, "routed_scaling_factor", 1.0)),
        bias=gate.bias,
        num_groups=int(_first(router, _GROUPS, 1)),
        num_best_groups=int(_first(router, _BEST_GROUPS, 1)),
    )


def _first(module: Any, names: Iterable[str], default: Any) -> Any:
    return next((found for name in names if (found := getattr(module, name, None)) is not None), default)


def _shared(body: Any) -> tuple[SharedExpert, ...]:
    shared = _first(body, ("shared_experts", "shared_expert"), None)
    if shared is None:
        return ()
    gate = getattr(body, "shared_expert_gate", None)
    return (SharedExpert(_swiglu(shared), None if gate is None else _matrix(gate, "shared_expert_gate")),)


def _swiglu(module: Any) -> Swiglu:
    return Swiglu(*(_matrix(getattr(module, name), name) for name in ("gate_proj", "up_proj", "down_proj")))


def _norm(module: Any, offset: float) -> Norm:
    if getattr(module, "bias", None) is not None:
        raise NotDescribed("its norms have biases")
    epsilon = _first(module, ("variance_epsilon", "eps"), None)
    if epsilon is None:
        raise NotDescribed(f"its norms are {type(module).__name__}")
    factors = _float32(module.weight, "its norms")
    return Norm(factors + offset if offset else factors, float(epsilon))


def _matrix(linear: nn.Module, name: str) -> Matrix:
    """A linear layer as it is kept; in the order that the model wants."""
    matrix, order = _ordered(linear, name)
    if order is not None:
        raise NotDescribed(f"the rows of {name} stand in another order")
    return matrix


def _paired(linear: nn.Module, heads: int) -> tuple[Matrix, bool]:
    """The same, or in the order in which neighbours are rotated, and whether it is."""
    matrix, order = _ordered(linear, "q_proj or k_proj")
    if order is None:
        return matrix, False
    width = matrix.rows // heads
    pairs = torch.arange(matrix.rows, device="cpu").view(heads, width // 2, 2).transpose(1, 2).flatten()
    if matrix.bias is not None or not torch.equal(order, pairs):
        raise NotDescribed("the rows of its queries or keys stand in an unknown order")
    return matrix, True


def _ordered(linear: Any, name: str) -> tuple[Matrix, torch.Tensor | None]:
    bias = _optional(linear.bias)
    packed = linear.packed if isinstance(linear, QuantizedLinear) else None
    if packed is None:
        if not isinstance(linear, nn.Linear | QuantizedLinear):
            raise NotDescribed(f"{name} is {type(linear).__name__}")
        return Matrix((_packed(_float32(linear.weight, name), name),), bias), None
    if packed.column_order is not None:
        raise NotDescribed(f"the columns of {name} stand in another order")
    return Matrix(packed.parts, bias), packed.row_order


def _packed(values: torch.Tensor, name: str) -> PackedMatrix:
    heads = values.shape[0] if values.dim() == 3 else 1
    return PackedMatrix(name, values.view(torch.uint8).flatten(), 0, values.shape[-2], values.shape[-1], heads)


def _float32(values: torch.Tensor, name: str) -> torch.Tensor:
    if values.device.type != "cpu" or values.dtype != torch.float32:
        raise NotDescribed(f"{name} are {values.dtype} on {values.device}, which graphs do not take")
    return values.detach().contiguous()


def _optional(values: torch.Tensor | None) -> torch.Tensor | None:
    return None if values is None else _float32(values, "its biases or sinks")
