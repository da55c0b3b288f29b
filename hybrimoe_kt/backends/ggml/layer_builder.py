"""What all graphs of a decoder layer have in common, whoever's tokens they are for: all but what is kept of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch

from hybrimoe_kt.device.packed import PackedMatrix
from hybrimoe_kt.quants import row_bytes

from .building import Builder, Region
from .choice import chosen_in
from .layer_pieces import linear, norm_of, shared_expert, swiglu
from .library import I32
from .linear_attention import StateAccess, linear_attention
from .parts import GatedLinear, GroupedQuery, Latent, LayerParts, Norm, Rotary
from .step_memory import Output

__all__ = ["Heads", "LayerBuilder", "more_nodes"]

_NODES_OF_A_TAP = 4
"""Of a convolution's: its factors, a view, a product and a sum."""
_PAIRED, _HALVES = 0, 2
"""ggml's numbers of the two layouts of rotary dimensions."""


def more_nodes(parts: LayerParts) -> int:
    """Operations of a layer beside those that every one may have."""
    return _NODES_OF_A_TAP * len(parts.attention.kernel) if isinstance(parts.attention, GatedLinear) else 0


class Heads(NamedTuple):
    """How queries meet keys and values."""

    heads: int
    kv_heads: int
    width: int
    """Of a query and a key."""
    value_width: int
    scale: float
    cap: float = 0.0
    sinks: torch.Tensor | None = None


class LayerBuilder(ABC):
    """The tensors of one layer's graph. `results` in their order compute it, `outputs` are what is read of it."""

    def __init__(
        self, builder: Builder, parts: LayerParts, tokens: int, width: int, hidden: Region, positions: Region
    ) -> None:
        self.builder, self._parts, self._tokens, self._width = builder, parts, tokens, width
        self._given, self._places = hidden, positions
        self.results: list[int] = []
        self.outputs: list[Output] = []

    @abstractmethod
    def _keep(self, key: int, value: int) -> None:
        """Write keys `[key_width, tokens]` and values to where the conversation's are."""

    @abstractmethod
    def _attend(self, query: int, heads: Heads) -> int:
        """Queries `[width, heads, tokens]` with what is held: `[value_width * heads, tokens]`."""

    @abstractmethod
    def _state(self) -> StateAccess:
        """What linear attention keeps."""

    def add(self) -> None:
        """Make all of it, once."""
        builder, parts, attention = self.builder, self._parts, self._parts.attention
        hidden = builder.input(self._given, self._width, self._tokens)
        normed = norm_of(builder, hidden, parts.attention_norm)
        if isinstance(attention, GatedLinear):
            added = linear_attention(builder, attention, normed, self._tokens, self._state())
        else:
            self._positions = builder.input(self._places, self._tokens, ggml_type=I32)
            if isinstance(attention, GroupedQuery):
                added = self._grouped(attention, normed)
            else:
                added = self._latent(attention, normed)
        residual = builder.plus(builder.scaled(added, parts.residual_factor), hidden)
        normed = norm_of(builder, residual, parts.feed_forward_norm)
        outputs: dict[str, tuple[int, int]] = {}
        if parts.dense is not None:
            added = builder.scaled(swiglu(builder, parts.dense, normed), parts.residual_factor)
            residual = builder.plus(added, residual)
        else:
            for shared in parts.shared:
                added = builder.scaled(shared_expert(builder, shared, normed), parts.residual_factor)
                residual = builder.plus(added, residual)
            outputs |= self._routing(parts, normed)
            outputs["normed"] = normed, self._width
        outputs["residual"] = residual, self._width
        self.results += [tensor for tensor, _ in outputs.values()]
        for name, (tensor, width) in outputs.items():
            dtype = torch.int32 if name == "ids" else torch.float32
            self.outputs.append(Output(name, builder.offset_of(tensor), width, dtype))

    def _routing(self, parts: LayerParts, normed: int) -> dict[str, tuple[int, int]]:
        assert parts.router is not None, "a layer without a dense feed-forward layer has a router"
        num_experts, width = parts.router.shape
        builder = self.builder
        logits = builder.product(builder.constant(parts.router, width, num_experts), normed)
        if parts.router_bias is not None:
            logits = builder.plus(logits, builder.constant(parts.router_bias, num_experts))
        found = {"logits": (logits, num_experts)}
        if parts.choice is not None:
            chosen = chosen_in(builder, parts.choice, logits, num_experts, self._tokens)
            if chosen is not None:
                found |= {"weights": (chosen[0], parts.choice.top_k), "ids": (chosen[1], parts.choice.top_k)}
        return found

    # Attention.

    def _grouped(self, parts: GroupedQuery, given: int) -> int:
        builder, tokens, width = self.builder, self._tokens, parts.head_dim
        query = linear(builder, parts.query, given)
        key, value = linear(builder, parts.key, given), linear(builder, parts.value, given)
        gate = None
        if parts.is_gated:
            row = 2 * width * 4
            both, strides = query, (row, row * parts.heads)
            query = builder.contiguous(builder.view(both, (width, parts.heads, tokens), strides))
            gate = builder.contiguous(builder.view(both, (width, parts.heads, tokens), strides, 4 * width))
            gate = builder.sigmoid(builder.reshape(gate, width * parts.heads, tokens))
        query = self._heads(query, parts.query_norm, width, parts.heads, parts.rotary)
        key = self._heads(key, parts.key_norm, width, parts.kv_heads, parts.rotary)
        self._keep(builder.reshape(key, parts.key_width, tokens), value)
        value_width = parts.value_width // parts.kv_heads
        heads = Heads(parts.heads, parts.kv_heads, width, value_width, parts.scale, parts.logit_cap, parts.sinks)
        answer = self._attend(query, heads)
        if gate is not None:
            answer = builder.times(answer, gate)
        return linear(builder, parts.output, answer)

    def _heads(self, values: int, norm: Norm | None, width: int, heads: int, rotary: Rotary | None) -> int:
        """Split a product into heads, normalised before or after that, and rotated: `[width, heads, tokens]`."""
        builder = self.builder
        is_of_a_head = norm is not None and norm.factors.numel() == width
        if norm is not None and not is_of_a_head:
            values = norm_of(builder, values, norm, in_place=True)
        values = builder.reshape(values, width, heads, self._tokens)
        if norm is not None and is_of_a_head:
            values = norm_of(builder, values, norm, in_place=True)
        return values if rotary is None else self._rotated(values, rotary)

    def _rotated(self, values: int, rotary: Rotary) -> int:
        builder = self.builder
        divisors = builder.constant(rotary.divisors, rotary.dims // 2)
        mode = _PAIRED if rotary.is_paired else _HALVES
        return builder.rotated(values, self._positions, (divisors, rotary.dims, mode, rotary.magnitude))

    def _latent(self, parts: Latent, given: int) -> int:
        builder, tokens, heads, rotated = self.builder, self._tokens, parts.heads, parts.rotary.dims
        query = given
        if parts.query_down is not None:
            assert parts.query_norm is not None, "comes with it"
            query = norm_of(builder, linear(builder, parts.query_down, given), parts.query_norm, in_place=True)
        query = linear(builder, parts.query, query)
        head = 4 * (parts.nope + rotated)
        strides = head, head * heads
        turned = builder.contiguous(builder.view(query, (rotated, heads, tokens), strides, 4 * parts.nope))
        turned = self._rotated(turned, parts.rotary)
        plain = builder.view(query, (parts.nope, heads, tokens), strides)
        latents = self._of_heads(parts.to_latent, plain, parts.nope, heads)  # [rank, tokens, heads]
        query = builder.joined(builder.permute(latents, 0, 2, 1, 3), turned)

        both = linear(builder, parts.latent, given)  # [rank + rotated, tokens]
        row = 4 * (parts.rank + rotated)
        latent = builder.contiguous(builder.view(both, (parts.rank, tokens), (row,)))
        latent = norm_of(builder, latent, parts.latent_norm, in_place=True)
        key = builder.contiguous(builder.view(both, (rotated, 1, tokens), (row, row), 4 * parts.rank))
        key = builder.reshape(self._rotated(key, parts.rotary), rotated, tokens)
        self._keep(builder.joined(latent, key), latent)

        read = self._attend(query, Heads(heads, 1, parts.key_width, parts.rank, parts.scale))
        read = builder.reshape(read, parts.rank, heads, tokens)
        context = self._of_heads(parts.to_value, read, parts.rank, heads, parts.value_stride, parts.value_offset)
        if tokens > 1:
            context = builder.contiguous(builder.permute(context, 0, 2, 1, 3))
        return linear(builder, parts.output, builder.reshape(context, parts.value * heads, tokens))

    def _of_heads(
        self, matrix: PackedMatrix, given: int, width: int, heads: int, stride: int = 0, offset: int = 0
    ) -> int:
        """Each head's matrix times its own of `given [width, heads, tokens]`: `[rows, tokens, heads]`."""
        builder = self.builder
        if stride:
            row = row_bytes(matrix.ggml_type, matrix.columns)
            whole = builder.constant(
                matrix.data, width, stride // row, heads, ggml_type=matrix.ggml_type, offset=offset
            )
            weight = builder.view(whole, (width, matrix.rows, heads), (row, stride))
        else:
            weight = builder.constant(matrix.data, width, matrix.rows, heads, ggml_type=matrix.ggml_type, offset=offset)
        return builder.product(weight, builder.permute(given, 0, 2, 1, 3))
