"""One graph for all of a decoder layer but its routed experts, and one for what follows the last layer."""

from __future__ import annotations

import math
import weakref
from typing import NamedTuple

import torch

from hybrimoe_kt.device.packed import PackedMatrix
from hybrimoe_kt.quants import row_bytes

from .building import Builder, Region, Workspace
from .choice import chosen_in
from .key_values import KeyValues
from .layer_pieces import linear, norm_of, shared_expert, swiglu
from .library import F16, I32, Library
from .linear_attention import linear_attention
from .parts import GatedLinear, GroupedQuery, HeadParts, Latent, LayerParts, Norm, Rotary
from .pool import FEW_TOKENS, Pool
from .recurrent_state import RecurrentState

__all__ = ["DenseAnswer", "HeadGraph", "Held", "LayerGraph", "StepMemory", "num_seen"]

Held = KeyValues | RecurrentState
"""What a layer keeps of a conversation."""

_NODES_OF_A_TAP = 4
"""Of a convolution's: its factors, a view, a product and a sum."""
_PAIRED, _HALVES = 0, 2
"""ggml's numbers of the two layouts of rotary dimensions."""


def num_seen(length: int) -> int:
    """How many tokens' keys a graph looks at for a conversation of `length`: few sizes, 255 too many at most."""
    step = 128 if length <= 512 else 256
    return -(-length // step) * step


class StepMemory:
    """What the graphs of all layers read and write in one step of `tokens` tokens."""

    def __init__(self, tokens: int, hidden: int, workspace: Workspace) -> None:
        self.tokens, self.width, self.workspace = tokens, hidden, workspace
        with torch.inference_mode(False):  # memory that is written to in any mode
            self.hidden = torch.zeros(tokens, hidden)
            self._positions = torch.zeros(tokens, dtype=torch.int32)
        self.hidden_region, self.positions = Region(self.hidden), Region(self._positions)
        self._masks: weakref.WeakValueDictionary[tuple[int, int], Region] = weakref.WeakValueDictionary()
        """Of the graphs that there are."""
        self._begin = 0

    def begin(self, position: int, seen: int) -> None:
        """Say at which position the step's first token stands, and how many positions are looked at."""
        self._begin = position
        torch.arange(position, position + self.tokens, out=self._positions)
        for (size, window), mask in list(self._masks.items()):
            if size == seen:
                self._write(mask.memory, window)

    def mask(self, seen: int, window: int) -> Region:
        """What each token sees of `seen` positions: float16 `[tokens, seen]`, 0 or minus infinity."""
        found = self._masks.get((seen, window))
        if found is None:
            with torch.inference_mode(False):
                memory = torch.empty(self.tokens, seen, dtype=torch.float16)
            self._write(memory, window)
            found = self._masks[seen, window] = Region(memory)
        return found

    def _write(self, mask: torch.Tensor, window: int) -> None:
        if self.tokens == 1:
            mask.fill_(-math.inf)
            mask[0, max(0, self._begin + 1 - window) if window else 0 : self._begin + 1] = 0
            return
        places = torch.arange(mask.shape[1])
        own = torch.arange(self._begin, self._begin + self.tokens)[:, None]
        seen = places <= own
        if window:
            seen &= places > own - window
        mask.fill_(-math.inf).masked_fill_(seen, 0)


class DenseAnswer(NamedTuple):
    """What a layer's graph leaves for its experts, valid until the next graph runs."""

    residual: torch.Tensor
    """float32 `[tokens, hidden]`; the layer's answer itself where it has no experts."""
    normed: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    """The router's, float32 `[tokens, num_experts]`."""
    ids: torch.Tensor | None = None
    """int32 `[tokens, top_k]`, where the graph chooses."""
    weights: torch.Tensor | None = None


_TYPES = {"ids": torch.int32}


class LayerGraph:
    """One layer for steps of as many tokens as `memory` is for, which look at `seen` positions.

    Of any conversation that is kept as `held` is, with memory for as many tokens.
    """

    def __init__(self, pool: Pool, parts: LayerParts, memory: StepMemory, held: Held, seen: int) -> None:
        self._memory, self._parts = memory, parts
        made = _LayerBuilder(pool.library, parts, memory, held, seen)
        self._regions = made.regions
        self._outputs = [(name, *place, _TYPES.get(name, torch.float32)) for name, place in made.outputs.items()]
        self._graph = made.builder.graph(pool, *made.results, is_short=memory.tokens <= FEW_TOKENS)

    def compute(self, held: Held) -> DenseAnswer:
        """Run for what follows in a conversation, with what `memory.hidden` holds."""
        for region, theirs in zip(self._regions, held.regions, strict=True):
            region.replace(theirs.memory)
        self._graph.compute(held.place)
        view, tokens = self._memory.workspace.view, self._memory.tokens
        return DenseAnswer(
            **{name: view(place, tokens, width, dtype=dtype) for name, place, width, dtype in self._outputs}
        )


class HeadGraph:
    """Logits of one token."""

    def __init__(self, pool: Pool, parts: HeadParts, hidden: int) -> None:
        builder = Builder(pool.library, Workspace())
        with torch.inference_mode(False):
            self._hidden = torch.empty(hidden)
        given = builder.input(Region(self._hidden), hidden)
        normed = norm_of(builder, given, parts.norm)
        out = builder.scaled(linear(builder, parts.head, normed), parts.logit_factor)
        self._graph = builder.graph(pool, out, is_short=True)
        self._workspace, self._offset = builder.workspace, builder.offset_of(out)
        self._rows = parts.head.rows

    def compute(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits float32 `[vocab]` for the last layer's answer `[hidden]`; valid until the next call."""
        self._hidden.copy_(hidden)
        self._graph.compute(0)
        return self._workspace.view(self._offset, self._rows)


class _LayerBuilder:
    """The tensors of one layer's graph."""

    def __init__(self, library: Library, parts: LayerParts, memory: StepMemory, held: Held, seen: int) -> None:
        taps = len(parts.attention.kernel) if isinstance(parts.attention, GatedLinear) else 0
        self.builder = builder = Builder(library, memory.workspace, _NODES_OF_A_TAP * taps)
        self._tokens, self._seen = memory.tokens, seen
        self.regions = Region(held.regions[0].memory), Region(held.regions[1].memory)
        if isinstance(held, KeyValues) and not isinstance(parts.attention, GatedLinear):
            self._held, (self.keys, self.values) = held, self.regions
            self._positions = builder.input(memory.positions, memory.tokens, ggml_type=I32)
            self._mask = builder.input(memory.mask(seen, parts.attention.window), seen, memory.tokens, ggml_type=F16)
        hidden = builder.input(memory.hidden_region, memory.width, memory.tokens)
        self.results: list[int] = []
        attention = parts.attention
        normed = norm_of(builder, hidden, parts.attention_norm)
        if isinstance(attention, GatedLinear):
            added, copy = linear_attention(builder, attention, normed, memory.tokens, *self.regions)
            self.results.append(copy)
        elif isinstance(attention, GroupedQuery):
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
            outputs["normed"] = normed, memory.width
        outputs["residual"] = residual, memory.width
        self.results += [tensor for tensor, _ in outputs.values()]
        self.outputs = {name: (builder.offset_of(tensor), width) for name, (tensor, width) in outputs.items()}

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
        answer = self._attend(
            query, parts.heads, parts.kv_heads, width, value_width, parts.scale, parts.logit_cap, parts.sinks
        )
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

    def _keep(self, key: int, value: int) -> None:
        """Write keys `[key_width, tokens]` and values to where the conversation's are."""
        builder, held, tokens = self.builder, self._held, self._tokens
        key_bytes = row_bytes(held.ggml_type, held.key_width)
        into = builder.context.tensor(held.ggml_type, held.key_width, tokens)
        self._write(key, into, self.keys, key_bytes)
        if not held.is_transposed:
            into = builder.context.tensor(held.ggml_type, held.value_width, tokens)
            self._write(value, into, self.values, row_bytes(held.ggml_type, held.value_width))
            return
        size = held.keys.memory.element_size()
        whole = builder.context.tensor(held.ggml_type, held.capacity, held.value_width)
        into = builder.raw_view(whole, (tokens, held.value_width), (size * held.capacity,))
        self._write(builder.permute(value, 1, 0, 2, 3), into, self.values, size)

    def _write(self, values: int, into: int, region: Region, stride: int) -> None:
        builder = self.builder
        builder.moving(into, region, 0, stride)
        self.results.append(builder.moving(builder.copied(values, into), region, 0, stride))

    def _attend(
        self,
        query: int,
        heads: int,
        kv_heads: int,
        width: int,
        value_width: int,
        scale: float,
        cap: float,
        sinks: torch.Tensor | None,
    ) -> int:
        """Queries `[width, heads, tokens]` with what is held: `[value_width * heads, tokens]`."""
        builder, held, tokens, seen = self.builder, self._held, self._tokens, self._seen
        key_row = row_bytes(held.ggml_type, held.key_width)
        keys = builder.input(self.keys, held.key_width, held.capacity, ggml_type=held.ggml_type)
        keys = builder.view(keys, (width, seen, kv_heads), (key_row, row_bytes(held.ggml_type, width)))
        if tokens > 1:
            query = builder.permute(query, 0, 2, 1, 3)  # [width, tokens, heads]
        if not held.is_transposed:
            query = query if tokens > 1 else builder.reshape(query, width, 1, heads)
            value_row = row_bytes(held.ggml_type, held.value_width)
            values = builder.input(self.values, held.value_width, held.capacity, ggml_type=held.ggml_type)
            strides = value_row, row_bytes(held.ggml_type, value_width)
            values = builder.view(values, (value_width, seen, kv_heads), strides)
            answer = builder.attention(query, keys, values, self._mask, scale, cap)
            if sinks is not None:
                builder.add_sinks(answer, sinks)
            return builder.reshape(answer, value_width * heads, tokens)
        query = builder.contiguous(query) if tokens > 1 else query
        group = heads // kv_heads
        logits = builder.product(keys, builder.reshape(query, width, tokens * group, kv_heads))
        if cap:
            logits = builder.scaled(builder.tanh(builder.scaled(logits, scale / cap)), cap)
            scale = 1.0
        logits = builder.reshape(logits, seen, tokens, heads)
        probabilities = builder.softmax(logits, self._mask, scale, sinks=sinks)
        probabilities = builder.reshape(probabilities, seen, tokens * group, kv_heads)
        size = held.values.memory.element_size()
        values = builder.input(self.values, held.capacity, held.value_width, ggml_type=held.ggml_type)
        strides = size * held.capacity, size * held.capacity * value_width
        values = builder.view(values, (seen, value_width, kv_heads), strides)
        answer = builder.product(values, probabilities)  # [value_width, tokens * group, kv_heads]
        if tokens > 1:
            answer = builder.reshape(answer, value_width, tokens, heads)
            answer = builder.contiguous(builder.permute(answer, 0, 2, 1, 3))
        return builder.reshape(answer, value_width * heads, tokens)

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

        read = self._attend(query, heads, 1, parts.key_width, parts.rank, parts.scale, 0.0, None)
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
