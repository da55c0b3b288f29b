"""Reads a Transformers decoder layer as parts that graphs are made of: recipes by what modules have, not by model.

Only the classes that the family's entry names are read, as what a module does with its parts is code. What has
something that no graph here does is refused with the reason, and stays Transformers' own.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hybrimoe_kt.backends.ggml.choice import Choice, choice_of
from hybrimoe_kt.backends.ggml.parts import (
    GatedLinear,
    GroupedQuery,
    HeadParts,
    Latent,
    LayerParts,
    Matrix,
    Rotary,
    SharedExpert,
    Swiglu,
)
from hybrimoe_kt.backends.ggml.up_projections import FusedUpProjections, SplitUpProjections
from hybrimoe_kt.operators.attention import DecodeAttention
from hybrimoe_kt.operators.attention_mla import AbsorbedMLA
from hybrimoe_kt.operators.experts import HybriMoEExperts
from hybrimoe_kt.operators.stored_layer import KeyLayout
from hybrimoe_kt.operators.stored_state import StateLayout

from .architectures import Architecture, LayerKind
from .gates import Gate, logits_and_ids
from .linear_parts import gated_linear
from .stock_weights import (
    NotDescribed,
    first_of,
    float32_of,
    matrix_of,
    norm_of,
    optional_of,
    ordered_of,
    packed_of,
)

__all__ = ["NotDescribed", "ReadLayer", "head_parts", "layer_parts"]

_TRIED = 64
"""Random states by which a router's choice is found out."""
_CHANGING = ("dynamic", "longrope")
_SILU = ("silu", "swish")
_GROUPS = ("num_group", "n_group")
_BEST_GROUPS = ("topk_group",)


@dataclass(frozen=True, slots=True, eq=False)
class ReadLayer:
    """A layer as graphs and as caches take it."""

    parts: LayerParts
    layout: KeyLayout | StateLayout
    experts: HybriMoEExperts | None
    router: tuple[nn.Module, tuple[Any, ...]] | None


def layer_parts(layer: nn.Module, config: Any, rotary: nn.Module | None, family: Architecture) -> ReadLayer:
    """Read a decoder layer of a loaded model; NotDescribed where something is not known here."""
    name = type(layer).__name__
    kind = family.layers.get(name)
    if kind is None:
        raise NotDescribed(f"{name} is not known here")
    reader = _Reader(layer, config, rotary, family, kind)
    return reader.read()


def head_parts(model: nn.Module, family: Architecture) -> HeadParts:
    """Read what follows the last layer; NotDescribed as above."""
    causal: Any = model
    factor = 1.0 / float(getattr(causal.config, "logits_scaling", 1.0) or 1.0)
    return HeadParts(norm_of(causal.model.norm, family.norm_offset), matrix_of(causal.lm_head, "lm_head"), factor)


class _Reader:
    def __init__(
        self, layer: nn.Module, config: Any, rotary: nn.Module | None, family: Architecture, kind: LayerKind
    ) -> None:
        self._layer, self._config, self._family, self._kind = layer, config, family, kind
        self._stock_rotary = rotary

    def read(self) -> ReadLayer:
        layer: Any = self._layer
        if getattr(self._config, "hidden_act", "silu") not in _SILU:
            raise NotDescribed(f"its activation is {self._config.hidden_act}")
        attention: Any = getattr(layer, "self_attn", None)
        if isinstance(attention, DecodeAttention):
            attention = attention.stock
        parts: GroupedQuery | Latent | GatedLinear
        layout: KeyLayout | StateLayout
        if attention is None:
            parts, layout = gated_linear(layer.linear_attn)
        elif isinstance(attention, AbsorbedMLA):
            parts, layout = self._latent(attention)
        elif hasattr(attention, "kv_b_proj"):
            raise NotDescribed("no rule gives its attention to AbsorbedMLA")
        else:
            parts, layout = self._grouped(attention)
        offset = self._family.norm_offset
        body: Any = layer.mlp if hasattr(layer, "mlp") else layer.block_sparse_moe
        experts = next((module for module in body.children() if isinstance(module, HybriMoEExperts)), None)
        norms = norm_of(layer.input_layernorm, offset), norm_of(getattr(layer, self._family.expert_norm), offset)
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
            router=float32_of(Gate(router, None, ()).weight, "its router"),
            router_bias=optional_of(Gate(router, None, ()).logit_bias),
            choice=_choice(router, further),
            shared=_shared(layer) or _shared(body),
            residual_factor=factor,
        )
        return ReadLayer(made, layout, experts, (router, further))

    def _router(self, body: Any) -> tuple[Any, tuple[Any, ...]]:
        router = body.gate if hasattr(body, "gate") else body.router
        if Gate(router, None, ()).weight.dtype != torch.float32:
            router = copy.deepcopy(router).float()  # as what it is asked about is
        return router, tuple(getattr(body, name, None) for name in self._family.router_inputs)

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
            norm_of(norm, self._family.norm_offset) if norm is not None else None
            for norm in (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
        ]
        if is_query_paired != is_key_paired or (is_key_paired and any(norms)):
            raise NotDescribed("its queries and keys stand in different orders")
        rotary = self._rotary(attention, is_paired=self._kind.is_paired or is_key_paired)
        window = _window(attention, config, self._kind)
        has_windows = getattr(config, "sliding_window", None) is not None
        is_turned = window > 0 or not (self._kind.turns_in_windows_only and has_windows)
        parts = GroupedQuery(
            query,
            key,
            matrix_of(attention.v_proj, "v_proj"),
            matrix_of(attention.o_proj, "o_proj"),
            heads,
            kv_heads,
            width,
            float(attention.scaling),
            rotary if is_turned else None,
            norms[0],
            norms[1],
            self._kind.is_gated,
            window,
            optional_of(getattr(attention, "sinks", None)),
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
            floats = float32_of(attention.kv_b_proj.weight, "kv_b_proj").view(heads, nope + value, rank)
            to_latent = packed_of(floats[:, :nope].transpose(1, 2).contiguous(), "kv_b_proj")
            to_value = packed_of(floats[:, nope:].contiguous(), "kv_b_proj")
        is_paired = bool(getattr(self._config, "rope_interleave", True))
        rotary = self._rotary(attention, is_paired=is_paired)
        has_down = attention.q_a_proj is not None
        parts = Latent(
            matrix_of(attention.q_b_proj if has_down else attention.q_proj, "q_proj"),
            matrix_of(attention.q_a_proj, "q_a_proj") if has_down else None,
            norm_of(attention.q_a_layernorm, 0.0) if has_down else None,
            matrix_of(attention.kv_a_proj_with_mqa, "kv_a_proj_with_mqa"),
            norm_of(attention.kv_a_layernorm, 0.0),
            to_latent,
            to_value,
            stride,
            offset,
            matrix_of(attention.o_proj, "o_proj"),
            heads,
            rank,
            nope,
            value,
            attention.scaling,
            rotary,
        )
        moves = is_paired and not attention.keeps_pairs
        return parts, KeyLayout(1, rank, _order(rotary.dims, rotary.dims) if moves else None)

    def _rotary(self, attention: Any, *, is_paired: bool) -> Rotary:
        module: Any = self._stock_rotary
        types = getattr(module, "rope_type", "default")
        kind = ""
        if isinstance(types, dict):  # of layers with windows and of those without
            own = self._config.layer_types[attention.layer_idx]
            types, kind = types[own], f"{own}_"
        if types in _CHANGING:
            raise NotDescribed(f"its rotary positions are {types}, which change with the conversation's length")
        frequencies = float32_of(getattr(module, f"{kind}inv_freq"), "its rotary positions")
        return Rotary(1.0 / frequencies, is_paired, float(getattr(module, f"{kind}attention_scaling")))


def _order(dims: int, width: int) -> torch.Tensor:
    """Where each dimension of a head with pairs is in one with halves; those behind `dims` stay."""
    order = torch.arange(width, device="cpu")
    order[:dims] = order[:dims].view(2, -1).t().flatten()
    return order


def _window(attention: Any, config: Any, kind: LayerKind) -> int:
    """Of this layer: an attention that could have one and says nothing looks at everything."""
    if not getattr(attention, "is_sliding", True):
        return 0
    owner = config if kind.takes_models_window else attention
    return int(getattr(owner, "sliding_window", None) or 0)


def _choice(router: Any, further: tuple[Any, ...]) -> Choice | None:
    """Ask a router about random states, and find the choice that answers alike."""
    gate = Gate(router, None, further)
    weight, added = gate.weight, gate.logit_bias
    generator = torch.Generator(device="cpu").manual_seed(20250405)
    hidden = torch.randn(_TRIED, weight.shape[1], generator=generator).to(weight)
    hidden *= 2 / nn.functional.linear(hidden, weight).float().std().clamp_min(1e-6)
    with torch.no_grad():
        answer = router.forward(hidden, *further)
    logits, ids = logits_and_ids(answer)
    if not torch.allclose(nn.functional.linear(hidden, weight, added).float(), logits.float(), rtol=1e-3, atol=1e-4):
        return None
    return choice_of(
        logits.float(),
        answer[1],
        ids,
        factor=float(getattr(router, "routed_scaling_factor", 1.0)),
        bias=gate.bias,
        num_groups=int(first_of(router, _GROUPS, 1)),
        num_best_groups=int(first_of(router, _BEST_GROUPS, 1)),
    )


def _shared(body: Any) -> tuple[SharedExpert, ...]:
    """Of a block, or of a layer that adds them to what its block answers."""
    shared = first_of(body, ("shared_experts", "shared_expert", "shared_mlp"), None)
    if shared is None:
        return ()
    gate = getattr(body, "shared_expert_gate", None)
    return (SharedExpert(_swiglu(shared), None if gate is None else matrix_of(gate, "shared_expert_gate")),)


def _swiglu(module: Any) -> Swiglu:
    if hasattr(module, "input_linear"):
        both, down = matrix_of(module.input_linear, "input_linear"), matrix_of(module.output_linear, "output_linear")
        return Swiglu(*_halves(both), down)
    return Swiglu(*(matrix_of(getattr(module, name), name) for name in ("gate_proj", "up_proj", "down_proj")))


def _halves(both: Matrix) -> tuple[Matrix, Matrix]:
    """A matrix whose rows are a gate's and then as many others."""
    if len(both.parts) == 2:
        return Matrix(both.parts[:1]), Matrix(both.parts[1:])
    (whole,) = both.parts
    rows, middle = whole.rows // 2, len(whole.data) // 2
    upper, lower = (
        dataclasses.replace(whole, data=data, rows=rows) for data in (whole.data[:middle], whole.data[middle:])
    )
    return Matrix((upper,)), Matrix((lower,))


def _paired(linear: nn.Module, heads: int) -> tuple[Matrix, bool]:
    """The same, or in the order in which neighbours are rotated, and whether it is."""
    matrix, order = ordered_of(linear, "q_proj or k_proj")
    if order is None:
        return matrix, False
    width = matrix.rows // heads
    pairs = torch.arange(matrix.rows, device="cpu").view(heads, width // 2, 2).transpose(1, 2).flatten()
    if matrix.bias is not None or not torch.equal(order, pairs):
        raise NotDescribed("the rows of its queries or keys stand in an unknown order")
    return matrix, True
