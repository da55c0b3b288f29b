"""A decoder layer's dense piece on ggml: graphs made as steps want them, and where steps leave what they compute."""

from __future__ import annotations

import functools
import time
from collections import OrderedDict
from collections.abc import Hashable, Sequence

import torch

from hybrimoe_kt.quants import TYPES

from .building import Workspace
from .key_values import GGML_TYPES, KeyValues
from .kinds import LayerKind
from .layer_graph import LayerGraph
from .parts import GatedLinear, Latent, LayerParts
from .pool import pool
from .recurrent_state import RecurrentState
from .rows_graph import RowsGraph
from .rows_memory import RowsMemory
from .step_memory import DenseAnswer, Held, StepMemory, num_seen

__all__ = ["DenseLayer", "DenseMemory"]

_MOST_GRAPHS = 4
"""Kept for each layer, the latest used: a conversation passes one for every 128 to 256 tokens. 58 KB of ggml's each."""
_MOST_LOGITS = 2**24
"""64 MiB. A choice: 32 tokens of 32 heads at 16,384 tokens."""
_MOST_SIZES = 8
"""Sizes of steps whose memory is kept."""
_MOST_ROWS_GRAPHS = 64
"""Kept of steps of several conversations for all layers together, the latest used: one for each kind of layer and
number of conversations. Some 150 KB of ggml's for 8 of them."""


class DenseMemory:
    """What the layers of one model share, as they run one after another."""

    def __init__(self, hidden: int) -> None:
        self._hidden, self._workspace = hidden, Workspace()
        self.pool = pool()
        """Whose threads compute, also when another model has asked for another number of them."""
        self._steps: OrderedDict[int, StepMemory] = OrderedDict()
        self.rows = RowsMemory(hidden, self._workspace)
        """For steps of several conversations."""
        self.kinds: dict[Hashable, int] = {}
        """Number of each kind of layer."""
        self._rows_graphs: OrderedDict[tuple[int, int, int], RowsGraph] = OrderedDict()
        self.seconds = 0.0
        """Spent in graphs since the start."""

    def step(self, tokens: int) -> StepMemory:
        """For steps of so many tokens."""
        found = self._steps.get(tokens)
        if found is None:
            found = self._steps[tokens] = StepMemory(tokens, self._hidden, self._workspace)
            if len(self._steps) > _MOST_SIZES:
                self._steps.popitem(last=False)
        else:
            self._steps.move_to_end(tokens)
        return found

    def rows_graph(self, parts: LayerParts, kind: LayerKind, held: Held) -> RowsGraph:
        """What computes a layer of a kind for as many conversations as `rows` has begun, kept as `held` is."""
        num, ggml_type = self.rows.num, held.ggml_type if isinstance(held, KeyValues) else -1
        key = kind.number, num, ggml_type
        found = self._rows_graphs.get(key)
        if found is None:
            found = self._rows_graphs[key] = RowsGraph(self.pool, parts, kind, self.rows, num, held)
            if len(self._rows_graphs) > _MOST_ROWS_GRAPHS:
                self._rows_graphs.popitem(last=False)
        else:
            self._rows_graphs.move_to_end(key)
        return found


class DenseLayer:
    """One layer: hidden states in; the residual stream, what experts take, and the router's choice out."""

    def __init__(self, parts: LayerParts, memory: DenseMemory) -> None:
        self.parts, self.memory = parts, memory
        self._graphs: OrderedDict[tuple[StepMemory, int, int], LayerGraph] = OrderedDict()

    def refuses(self, type_name: str) -> str | None:
        """Return why keys and values cannot be kept in a type, None when they can."""
        attention = self.parts.attention
        if isinstance(attention, GatedLinear):
            return None
        if type_name not in GGML_TYPES:
            return f"kv_cache_type {type_name} is for layers on a GPU, ggml computes this one; take f16, f32 or q8_0"
        heads = 1 if isinstance(attention, Latent) else attention.kv_heads
        step = TYPES[GGML_TYPES[type_name]].block_values
        widths = attention.key_width // heads, attention.value_width // heads
        odd = next((width for width in widths if width % step), None)
        if odd is None:
            return None
        return f"kv_cache_type {type_name} takes heads a multiple of {step} wide, these are {odd}; take f16 or f32"

    def new_held(self, type_name: str) -> Held:
        """Memory for a conversation: keys and values in this type, or a state."""
        attention = self.parts.attention
        if isinstance(attention, GatedLinear):
            kept = len(attention.kernel) - 1
            return RecurrentState(attention.channels, kept, attention.value_heads, attention.head_dim)
        return KeyValues(attention.key_width, attention.value_width, type_name)

    def compute(self, held: Held, step: StepMemory) -> DenseAnswer:
        """Run with what `step.hidden` holds, which follows what is held, and hold that as well.

        `step` was begun at `held.length`. The answer is valid until the next layer's.
        """
        end = held.length + step.tokens
        held.reserve(end)
        key = step, num_seen(end) if isinstance(held, KeyValues) else 0, held.capacity
        graph = self._graphs.get(key)
        if graph is None:
            graph = self._graphs[key] = LayerGraph(self.memory.pool, self.parts, step, held, key[1])
            if len(self._graphs) > _MOST_GRAPHS:
                self._graphs.popitem(last=False)
        else:
            self._graphs.move_to_end(key)
        began = time.perf_counter()
        answer = graph.compute(held)
        self.memory.seconds += time.perf_counter() - began
        held.advance(step.tokens)
        return answer

    @functools.cached_property
    def _kind(self) -> LayerKind:
        return LayerKind(self.parts, self.memory.kinds)

    def compute_rows(self, held: Sequence[Held]) -> DenseAnswer:
        """The same for a token each of several conversations, with what `memory.rows` holds.

        That was begun at their `length`s, in this order.
        """
        for each in held:
            each.reserve(each.length + 1)
        graph = self.memory.rows_graph(self.parts, self._kind, held[0])
        began = time.perf_counter()
        answer = graph.compute(self._kind, held)
        self.memory.seconds += time.perf_counter() - began
        for each in held:
            each.advance(1)
        return answer

    def takes(self, tokens: int, length: int) -> bool:
        """Whether a graph is for so many tokens, of a conversation of `length` with them.

        Several at once have the logits of all of them in memory, and long conversations many.
        """
        heads = getattr(self.parts.attention, "heads", 0)
        return tokens == 1 or tokens * num_seen(length) * heads <= _MOST_LOGITS

    def begin(self, step: StepMemory, position: int) -> torch.Tensor:
        """Say where a step's first token stands; return where its hidden states are written, `[tokens, hidden]`."""
        step.begin(position, num_seen(position + step.tokens))
        return step.hidden
