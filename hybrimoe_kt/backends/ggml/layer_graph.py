"""One graph for all of a decoder layer but its routed experts, for tokens of one conversation."""

from __future__ import annotations

from hybrimoe_kt.quants import row_bytes

from .building import Builder, Region
from .key_values import KeyValues
from .layer_builder import Heads, LayerBuilder, more_nodes
from .library import F16, F32, Library
from .linear_attention import StateAccess
from .parts import GatedLinear, LayerParts
from .pool import FEW_TOKENS, Pool
from .step_memory import DenseAnswer, Held, StepMemory, answer_from

__all__ = ["LayerGraph"]


class LayerGraph:
    """One layer for steps of as many tokens as `memory` is for, which look at `seen` positions.

    Of any conversation that is kept as `held` is, with memory for as many tokens.
    """

    def __init__(self, pool: Pool, parts: LayerParts, memory: StepMemory, held: Held, seen: int) -> None:
        self._memory, self._parts = memory, parts
        made = _Builder(pool.library, parts, memory, held, seen)
        self._regions, self._outputs = made.regions, tuple(made.outputs)
        self._graph = made.builder.graph(pool, *made.results, is_short=memory.tokens <= FEW_TOKENS)

    def compute(self, held: Held) -> DenseAnswer:
        """Run for what follows in a conversation, with what `memory.hidden` holds."""
        for region, theirs in zip(self._regions, held.regions, strict=True):
            region.follow(theirs)
        self._graph.compute(held.place)
        return answer_from(self._memory.workspace, self._outputs, self._memory.tokens)


class _Builder(LayerBuilder):
    """The tensors of one layer's graph."""

    def __init__(self, library: Library, parts: LayerParts, memory: StepMemory, held: Held, seen: int) -> None:
        builder = Builder(library, memory.workspace, more_nodes(parts))
        super().__init__(builder, parts, memory.tokens, memory.width, memory.hidden_region, memory.positions)
        self._seen = seen
        self.regions = Region(held.regions[0].memory), Region(held.regions[1].memory)
        if isinstance(held, KeyValues) and not isinstance(parts.attention, GatedLinear):
            self._held, (self.keys, self.values) = held, self.regions
            self._mask = builder.input(memory.mask(seen, parts.attention.window), seen, memory.tokens, ggml_type=F16)
        self.add()

    def _state(self) -> StateAccess:
        return _State(self.builder, self.results, self._tokens, *self.regions)

    def _keep(self, key: int, value: int) -> None:
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

    def _attend(self, query: int, given: Heads) -> int:
        builder, held, tokens, seen = self.builder, self._held, self._tokens, self._seen
        heads, kv_heads, width, value_width, scale, cap, sinks = given
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


class _State(StateAccess):
    """One conversation's."""

    def __init__(self, builder: Builder, results: list[int], tokens: int, columns: Region, state: Region) -> None:
        self._builder, self._results, self._tokens = builder, results, tokens
        self._columns, self._state = columns, state

    def latest(self, mixed: int, channels: int, num_taps: int) -> list[int]:
        builder, row = self._builder, 4 * channels
        offset = row * (num_taps - 1)
        into = builder.moving(builder.context.tensor(F32, channels, self._tokens), self._columns, offset, row)
        self._results.append(builder.moving(builder.copied(mixed, into), self._columns, offset, row))
        seen = (builder.context.tensor(F32, channels, self._tokens) for _ in range(num_taps))
        return [builder.moving(tensor, self._columns, back * row, row) for back, tensor in enumerate(seen)]

    def read(self, query: int, key: int, value: int, decay: int, beta: int, width: int, heads: int) -> int:
        sizes = width, heads, self._tokens
        return self._builder.delta_rule(query, key, value, decay, beta, self._state, sizes)
