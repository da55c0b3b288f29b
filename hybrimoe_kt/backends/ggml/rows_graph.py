"""One graph for all of a decoder layer but its routed experts, for a token each of several conversations.

Products with weights are of all rows at once. Each row attends to memory of its own, as long as its conversation is:
what the graph is told of rows' memory is written into its tensors before each run, so that one graph is for any
conversations of any lengths, and for all layers of one kind.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hybrimoe_kt.quants import row_bytes

from .building import Builder
from .key_values import KeyValues
from .kinds import LayerKind
from .layer_builder import Heads, LayerBuilder, more_nodes
from .library import DATA, F16, F32, SIZES, STRIDES, Library
from .linear_attention import StateAccess
from .parts import GatedLinear, LayerParts
from .pool import Pool
from .rows_memory import RowsMemory
from .step_memory import DenseAnswer, Held, answer_from
from .words import FACTS, Addresses, Fact, Integers, Word, Words, words_of

__all__ = ["RowsGraph"]

_NODES_OF_A_ROW = 16
"""Of attention, with its copies and a cap, and as many tensors that nothing computes; linear attention has fewer."""
_SEEN = 128
"""What tensors are made for, before they are told of rows."""
_SIZES = Fact.SEEN, Fact.CAPACITY
"""Facts that seldom change: sizes and strides follow from them."""


class RowsGraph:
    """A layer, or others of its kind, for `num` rows, kept as `held` is."""

    def __init__(
        self, pool: Pool, parts: LayerParts, kind: LayerKind, memory: RowsMemory, num: int, held: Held
    ) -> None:
        self._memory, self._num = memory, num
        made = _Builder(pool.library, parts, memory, num, held)
        self._outputs, self._heads = tuple(made.outputs), made.num_heads
        self._window = getattr(parts.attention, "window", 0)
        self._graph = made.builder.graph(pool, *made.results, is_short=True)
        known = [
            (tensor, found[0], found[1] + offset)
            for tensor, (values, offset) in made.builder.constants.items()
            if (found := kind.find(values)) is not None
        ]
        self._weights = Addresses(*zip(*known, strict=True))
        self._sizes = Words([word for word in made.words if word.fact in _SIZES]) if self._heads else None
        self._places = Words([word for word in made.words if word.fact not in _SIZES])
        self._sized: list[list[int]] = []
        self._most_seen = 0

    def compute(self, kind: LayerKind, held: Sequence[Held]) -> DenseAnswer:
        """Run for the layer whose weights `kind` has, for the rows' conversations, with what `memory.hidden` holds."""
        memory = self._memory
        masks = memory.seen if self._sizes is None else memory.masks(self._window)
        listed: list[int] = []
        for each, mask, seen in zip(held, masks, memory.seen, strict=True):
            listed += each.facts
            listed += mask, seen
        facts = np.array(listed, dtype=np.int64)
        if self._sizes is not None:
            self._resize(self._sizes, facts, [memory.seen, listed[Fact.CAPACITY :: FACTS]])
        self._places.write(facts)
        self._weights.write(kind.addresses)
        self._graph.compute(0)
        return answer_from(memory.workspace, self._outputs, self._num)

    def _resize(self, words: Words, facts: Integers, sized: list[list[int]]) -> None:
        if sized == self._sized:
            return
        words.write(facts)
        most_seen = self._memory.most_seen
        self._memory.logits.reserve(4 * most_seen * self._heads)
        if most_seen > self._most_seen:  # scratch memory is as large as the longest row wants it
            self._graph.plan()
            self._most_seen = most_seen
        self._sized = sized  # last, should it be interrupted


class _Builder(LayerBuilder):
    """The tensors, and `words` of them that follow from rows."""

    def __init__(self, library: Library, parts: LayerParts, memory: RowsMemory, num: int, held: Held) -> None:
        builder = Builder(library, memory.workspace, more_nodes(parts) + _NODES_OF_A_ROW * num)
        super().__init__(builder, parts, num, memory.width, memory.hidden_region, memory.positions)
        self.words: list[Word] = []
        self._memory, self._held, self.num, self.num_heads = memory, held, num, 0
        if isinstance(held, KeyValues):
            assert not isinstance(parts.attention, GatedLinear), "which keeps a state"
            key_row, value_row = row_bytes(held.ggml_type, held.key_width), row_bytes(held.ggml_type, held.value_width)
            self._key_row, self._value_row = key_row, value_row
            self._value_bytes = row_bytes(held.ggml_type, 1) if held.is_transposed else 0
            self.num_heads = parts.attention.heads
        self.add()

    def _state(self) -> StateAccess:
        return _States(self)

    # Tensors of rows.

    def row_of(self, tensor: int, row: int, num_values: int, *sizes: int) -> int:
        """Look at one row of a result `[num_values, rows]`; who asks puts that into `results` before."""
        found = self.builder.context.tensor(F32, *sizes)
        return self.builder.within(found, tensor, 4 * num_values * row)

    def slice_of(self, tensor: int, row: int, axis: int) -> int:
        """The same of what may lie apart, whose rows are its axis."""
        whole = words_of(tensor)
        found = self.builder.context.tensor(F32, *whole[SIZES : SIZES + axis])
        words_of(found)[STRIDES : STRIDES + 4] = whole[STRIDES : STRIDES + 4]
        return self.builder.within(found, tensor, row * whole[STRIDES + axis])

    def word(self, tensor: int, row: int, fact: Fact, offset: int = 0, stride: int = 0) -> int:
        """Say that a tensor is so far behind a row's address, and `stride` further for each token held."""
        self.words.append(Word(tensor, DATA, row, fact, 1, offset, stride))
        return tensor

    def _seen(self, tensor: int, row: int, *sizes: int, value_bytes: int = 4) -> int:
        """Say that a tensor is `[seen, *sizes]`, one row of it after the other."""
        self.words.append(Word(tensor, SIZES, row, Fact.SEEN))
        return self._apart(tensor, row, Fact.SEEN, *sizes, value_bytes=value_bytes)

    def _apart(self, tensor: int, row: int, fact: Fact, *sizes: int, value_bytes: int) -> int:
        """Say that what is next to each other along the first of `sizes` is `fact` values apart, and so on."""
        stride = value_bytes
        for axis, size in enumerate((*sizes, 1, 1)[:3], 1):
            self.words.append(Word(tensor, STRIDES + axis, row, fact, stride))
            stride *= size
        return tensor

    # Attention.

    def _keep(self, key: int, value: int) -> None:
        held = self._held
        assert isinstance(held, KeyValues)
        self.results += [key, value]
        context, kind = self.builder.context, held.ggml_type
        for row in range(self._tokens):
            given = self.row_of(key, row, held.key_width, held.key_width)
            self._write(given, context.tensor(kind, held.key_width), row, Fact.FIRST, self._key_row)
            if not held.is_transposed:
                given = self.row_of(value, row, held.value_width, held.value_width)
                self._write(given, context.tensor(kind, held.value_width), row, Fact.SECOND, self._value_row)
                continue
            given = self.row_of(value, row, held.value_width, 1, held.value_width)
            written = self._write(given, context.tensor(kind, 1, held.value_width), row, Fact.SECOND, self._value_bytes)
            self._apart(written, row, Fact.CAPACITY, held.value_width, value_bytes=self._value_bytes)

    def _write(self, values: int, into: int, row: int, fact: Fact, stride: int) -> int:
        self.word(into, row, fact, 0, stride)
        written = self.word(self.builder.copied(values, into), row, fact, 0, stride)
        self.results.append(written)
        return written

    def _attend(self, query: int, heads: Heads) -> int:
        builder, held = self.builder, self._held
        assert isinstance(held, KeyValues)
        self.results.append(query)
        width = heads.value_width * heads.heads
        answer = builder.new(builder.context.tensor(F32, width, self._tokens))
        for row in range(self._tokens):
            made = self._attend_row(query, heads, held, row)
            self.results.append(builder.within(made, answer, 4 * width * row))
        return answer

    def _attend_row(self, query: int, given: Heads, held: KeyValues, row: int) -> int:
        """One row's queries with its own keys and values, as of a conversation alone."""
        builder, context, library = self.builder, self.builder.context, self.builder.library
        heads, kv_heads, width, value_width, scale, cap, sinks = given
        group, pointer = heads // kv_heads, context.pointer
        keys = self.word(context.tensor(held.ggml_type, width, _SEEN, kv_heads), row, Fact.FIRST)
        words_of(keys)[STRIDES + 1 : STRIDES + 3] = self._key_row, row_bytes(held.ggml_type, width)
        self.words.append(Word(keys, SIZES + 1, row, Fact.SEEN))
        mask = self.word(context.tensor(F16, _SEEN, 1), row, Fact.MASK)
        self._seen(mask, row, 1, value_bytes=2)
        if not held.is_transposed:
            values = self.word(context.tensor(held.ggml_type, value_width, _SEEN, kv_heads), row, Fact.SECOND)
            words_of(values)[STRIDES + 1 : STRIDES + 3] = self._value_row, row_bytes(held.ggml_type, value_width)
            self.words.append(Word(values, SIZES + 1, row, Fact.SEEN))
            query = self.row_of(query, row, width * heads, width, 1, heads)
            made = int(library.ggml_flash_attn_ext(pointer, query, keys, values, mask, scale, 0.0, cap))
            if sinks is not None:
                builder.add_sinks(made, sinks)
            return made
        query = self.row_of(query, row, width * heads, width, group, kv_heads)
        self._logits(library.ggml_mul_mat(pointer, keys, query), row, group, kv_heads, is_computed=True)
        if cap:
            for operation, *factor in (
                (library.ggml_scale, scale / cap),
                (library.ggml_tanh,),
                (library.ggml_scale, cap),
            ):
                logits = self._logits(context.tensor(F32, _SEEN, group, kv_heads), row, group, kv_heads)
                self._logits(operation(pointer, logits, *factor), row, group, kv_heads, is_computed=True)
            scale = 1.0
        logits = self._logits(context.tensor(F32, _SEEN, 1, heads), row, 1, heads)
        made = library.ggml_soft_max_ext(pointer, logits, mask, scale, 0.0)
        if sinks is not None:
            library.ggml_soft_max_add_sinks(made, builder.constant(sinks, sinks.numel()))
        self._logits(made, row, 1, heads, is_computed=True)
        probabilities = self._logits(context.tensor(F32, _SEEN, group, kv_heads), row, group, kv_heads)
        values = self.word(context.tensor(held.ggml_type, _SEEN, value_width, kv_heads), row, Fact.SECOND)
        self.words.append(Word(values, SIZES, row, Fact.SEEN))
        self._apart(values, row, Fact.CAPACITY, value_width, kv_heads, value_bytes=self._value_bytes)
        return int(library.ggml_mul_mat(pointer, values, probabilities))

    def _logits(self, tensor: int, row: int, *sizes: int, is_computed: bool = False) -> int:
        """Say that a tensor is a row's logits, or what becomes of them, in memory of all rows by turns."""
        if is_computed:
            self.results.append(tensor)
        return self._seen(self.builder.at(tensor, self._memory.logits, 0), row, *sizes)


class _States(StateAccess):
    """Rows' states of linear attention."""

    def __init__(self, builder: _Builder) -> None:
        self._rows = builder

    def latest(self, mixed: int, channels: int, num_taps: int) -> list[int]:
        rows, builder, context = self._rows, self._rows.builder, self._rows.builder.context
        num, row_width = rows.num, 4 * channels
        rows.results.append(mixed)
        joint = builder.new(context.tensor(F32, channels, num_taps, num))
        for row in range(num):
            into = rows.word(context.tensor(F32, channels), row, Fact.FIRST, row_width * (num_taps - 1), row_width)
            copy = builder.copied(rows.slice_of(mixed, row, 1), into)
            rows.results.append(rows.word(copy, row, Fact.FIRST, row_width * (num_taps - 1), row_width))
            window = rows.word(context.tensor(F32, channels, num_taps), row, Fact.FIRST, 0, row_width)
            into = rows.row_of(joint, row, channels * num_taps, channels, num_taps)
            rows.results.append(builder.within(builder.copied(window, into), into))
        strides = (row_width * num_taps,)
        return [builder.view(joint, (channels, num), strides, back * row_width) for back in range(num_taps)]

    def read(self, query: int, key: int, value: int, decay: int, beta: int, width: int, heads: int) -> int:
        """Each row's is a run of one token, whose answer stands in front of its state."""
        rows, builder, context = self._rows, self._rows.builder, self._rows.builder.context
        joint = builder.new(context.tensor(F32, width, heads, rows.num))
        rows.results += [query, key, value, decay, beta]
        for row in range(rows.num):
            given = (rows.slice_of(tensor, row, 2) for tensor in (query, key, value, decay, beta))
            before = rows.word(context.tensor(F32, width, width, heads), row, Fact.SECOND)
            made = builder.library.ggml_gated_delta_net(context.pointer, *given, before, 1)
            rows.word(made, row, Fact.SECOND, -4 * width * heads)
            answer = rows.word(context.tensor(F32, width, heads), row, Fact.SECOND, -4 * width * heads)
            into = rows.row_of(joint, row, width * heads, width, heads)
            rows.results += [made, builder.within(builder.copied(answer, into), into)]
        return joint
