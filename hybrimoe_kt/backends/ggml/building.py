"""Graphs of many operations: each result gets its place as it is made, and places move as memory does.

ggml's own allocators want buffers of its kind; here weights lie in the mapped file, keys and values in memory that
grows, and everything between in one workspace, which the graphs of all layers share, as they run one after another.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

import torch

from .library import F32, Context, Library, data_of
from .pool import Graph, Pool

__all__ = ["Builder", "PlacedGraph", "Region", "Workspace"]

_ALIGNED_BYTES = 64
_MOST_NODES, _MOST_TENSORS = 96, 144
"""Of a layer. The longest known, DeepSeek's and Qwen3-Next's, have 64 and 88.

More than there is room for would end the process, so that what a file may have more of is counted beside these.
"""


class Region:
    """Memory by its address, which changes when other memory takes its place."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.replace(memory)

    def replace(self, memory: torch.Tensor) -> None:
        """Stand for `memory`, on the CPU, from now on."""
        self.memory, self.address = memory, memory.data_ptr()

    def follow(self, other: Region) -> None:
        """Stand for what another stands for now."""
        self.memory, self.address = other.memory, other.address

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Be a copy, whose memory is another's."""
        self.__dict__.update(state)
        self.replace(self.memory)


class Workspace(Region):
    """What lies between the operations of a graph; as large as the largest wants it."""

    def __init__(self) -> None:
        super().__init__(torch.empty(0, dtype=torch.uint8))
        self.views: dict[Hashable, Any] = {}
        """Of this memory, forgotten when it grows: they would keep what was there before."""

    def reserve(self, num_bytes: int) -> None:
        """Have at least so many bytes."""
        if num_bytes > self.memory.numel():
            self.views.clear()
            with torch.inference_mode(False):
                self.replace(torch.empty(num_bytes, dtype=torch.uint8))

    def view(self, offset: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The values at `offset`, until the workspace grows; the same tensor each time, and to be kept by nobody."""
        key = offset, shape, dtype
        found: torch.Tensor | None = self.views.get(key)
        if found is None:
            size = dtype.itemsize * math.prod(shape)
            found = self.views[key] = self.memory[offset : offset + size].view(dtype).view(shape)
        return found


class Builder:
    """Makes the tensors of one graph. Sizes are ggml's, the innermost first; tensors are addresses."""

    def __init__(self, library: Library, workspace: Workspace, num_more: int = 0) -> None:
        """`num_more`: operations beside those that every layer may have."""
        self.library, self.workspace = library, workspace
        self.context = Context(library, _MOST_TENSORS + 2 * num_more, num_nodes=_MOST_NODES + num_more)
        self._pointer = self.context.pointer
        self._places: dict[int, tuple[Region, int]] = {}
        self._moving: list[tuple[int, Region, int, int]] = []
        self.constants: dict[int, tuple[torch.Tensor, int]] = {}
        """Tensor -> values that stay where they are, and how many bytes behind their beginning it starts."""
        self._num_bytes = 0

    # What is there before the graph runs.

    def constant(self, values: torch.Tensor, *sizes: int, ggml_type: int = F32, offset: int = 0) -> int:
        """Values that stay where they are, such as weights; `offset` in bytes."""
        tensor = self.context.tensor(ggml_type, *sizes)
        return self._fixed(tensor, values, offset)

    def input(self, region: Region, *sizes: int, ggml_type: int = F32) -> int:
        """What somebody writes into `region` before each run."""
        return self._put(self.context.tensor(ggml_type, *sizes), region, 0)

    # Where results are.

    def new(self, tensor: int) -> int:
        """Give a result memory of its own."""
        place = self._num_bytes
        size = self.library.ggml_nbytes(tensor)
        self._num_bytes += -(-size // _ALIGNED_BYTES) * _ALIGNED_BYTES
        return self._put(tensor, self.workspace, place)

    def at(self, tensor: int, region: Region, offset: int) -> int:
        """Say that `tensor` is `offset` bytes within `region`, or that many before it."""
        return self._put(tensor, region, offset)

    def over(self, tensor: int, other: int) -> int:
        """Write a result where `other` is, which nobody reads any more: element by element only."""
        return self._put(tensor, *self._places[other])

    def within(self, tensor: int, other: int, offset: int = 0) -> int:
        """Say that `tensor` is a view of `other`, `offset` bytes behind its beginning."""
        if other not in self._places:
            values, before = self.constants[other]
            return self._fixed(tensor, values, before + offset)
        region, place = self._places[other]
        return self._put(tensor, region, place + offset)

    def moving(self, tensor: int, region: Region, offset: int, stride: int) -> int:
        """Say that `tensor` is `offset` bytes within `region`, and `stride` further for each position of a run."""
        self._moving.append((tensor, region, offset, stride))
        return tensor

    def offset_of(self, tensor: int) -> int:
        """Where in the workspace a result is, in bytes."""
        region, place = self._places[tensor]
        assert region is self.workspace, "a result"
        return place

    def _fixed(self, tensor: int, values: torch.Tensor, offset: int) -> int:
        data_of(tensor).value = values.data_ptr() + offset
        self.constants[tensor] = values, offset
        return tensor

    def _put(self, tensor: int, region: Region, place: int) -> int:
        self._places[tensor] = region, place
        return tensor

    # Operations.

    def reshape(self, tensor: int, *sizes: int) -> int:
        """Give contiguous values another shape."""
        four = (*sizes, 1, 1, 1)[:4]
        return self.within(self.library.ggml_reshape_4d(self._pointer, tensor, *four), tensor)

    def permute(self, tensor: int, *axes: int) -> int:
        """Let axis `i` become axis `axes[i]`, moving nothing."""
        return self.within(self.library.ggml_permute(self._pointer, tensor, *axes), tensor)

    def view(self, tensor: int, sizes: tuple[int, ...], strides: tuple[int, ...], offset: int = 0) -> int:
        """Look at values `strides` bytes apart in all but the innermost axis."""
        four, given = (*sizes, 1, 1, 1)[:4], [*strides]
        while len(given) < 3:  # of axes of one
            given.append(given[-1] * four[len(given)])
        return self.within(self.library.ggml_view_4d(self._pointer, tensor, *four, *given, offset), tensor, offset)

    def raw_view(self, tensor: int, sizes: tuple[int, ...], strides: tuple[int, ...]) -> int:
        """The same of what has no place yet; the view is given one."""
        four, given = (*sizes, 1, 1, 1)[:4], [*strides]
        while len(given) < 3:
            given.append(given[-1] * four[len(given)])
        return int(self.library.ggml_view_4d(self._pointer, tensor, *four, *given, 0))

    def contiguous(self, tensor: int) -> int:
        """A copy in order."""
        return self.new(self.library.ggml_cont(self._pointer, tensor))

    def product(self, weight: int, given: int) -> int:
        """Every row of `weight` with every row of `given`."""
        return self.new(self.library.ggml_mul_mat(self._pointer, weight, given))

    def times(self, values: int, factors: int, *, in_place: bool = True) -> int:
        made = self.library.ggml_mul(self._pointer, values, factors)
        return self.over(made, values) if in_place else self.new(made)

    def plus(self, values: int, others: int, *, in_place: bool = True) -> int:
        made = self.library.ggml_add(self._pointer, values, others)
        return self.over(made, values) if in_place else self.new(made)

    def divided(self, values: int, divisors: int) -> int:
        return self.over(self.library.ggml_div(self._pointer, values, divisors), values)

    def scaled(self, values: int, factor: float, *, in_place: bool = True) -> int:
        if factor == 1.0:
            return values
        made = self.library.ggml_scale(self._pointer, values, factor)
        return self.over(made, values) if in_place else self.new(made)

    def clamped(self, values: int, least: float, most: float, *, in_place: bool = True) -> int:
        """Values within bounds, also those that are not numbers."""
        made = self.library.ggml_clamp(self._pointer, values, least, most)
        return self.over(made, values) if in_place else self.new(made)

    def normalised(self, values: int, epsilon: float, *, in_place: bool = False) -> int:
        """Rows divided by their root mean square."""
        made = self.library.ggml_rms_norm(self._pointer, values, epsilon)
        return self.over(made, values) if in_place else self.new(made)

    def sigmoid(self, values: int, *, in_place: bool = True) -> int:
        made = self.library.ggml_sigmoid(self._pointer, values)
        return self.over(made, values) if in_place else self.new(made)

    def tanh(self, values: int) -> int:
        return self.over(self.library.ggml_tanh(self._pointer, values), values)

    def silu(self, values: int) -> int:
        return self.over(self.library.ggml_silu(self._pointer, values), values)

    def softplus(self, values: int) -> int:
        return self.over(self.library.ggml_softplus(self._pointer, values), values)

    def softmax(
        self,
        values: int,
        mask: int | None = None,
        scale: float = 1.0,
        *,
        sinks: torch.Tensor | None = None,
        in_place: bool = True,
    ) -> int:
        """Probabilities of `scale * values + mask` along the innermost axis; `sinks` has a logit more a head."""
        made = self.library.ggml_soft_max_ext(self._pointer, values, mask, scale, 0.0)
        if sinks is not None:
            self.library.ggml_soft_max_add_sinks(made, self.constant(sinks, sinks.numel()))
        return self.over(made, values) if in_place else self.new(made)

    def swiglu(self, gate: int, up: int) -> int:
        """`silu(gate) * up`."""
        return self.over(self.library.ggml_swiglu_split(self._pointer, gate, up), gate)

    def sums(self, values: int) -> int:
        """One of each row."""
        return self.new(self.library.ggml_sum_rows(self._pointer, values))

    def largest(self, values: int, number: int) -> int:
        """The places of the `number` largest of each row, int32."""
        return self.new(self.library.ggml_top_k(self._pointer, values, number))

    def picked(self, rows: int, places: int) -> int:
        """The rows at these places."""
        return self.new(self.library.ggml_get_rows(self._pointer, rows, places))

    def repeated(self, values: int, *sizes: int) -> int:
        """Values again and again, until they are so many in each axis."""
        four = (*sizes, 1, 1, 1)[:4]
        return self.new(self.library.ggml_repeat_4d(self._pointer, values, *four))

    def joined(self, first: int, second: int) -> int:
        """One behind the other along the innermost axis."""
        return self.new(self.library.ggml_concat(self._pointer, first, second, 0))

    def copied(self, values: int, into: int) -> int:
        """Write values into another tensor's memory, in its type."""
        return int(self.library.ggml_cpy(self._pointer, values, into))

    def rotated(self, values: int, positions: int, rotary: RotaryArguments) -> int:
        divisors, dims, mode, magnitude = rotary
        made = self.library.ggml_rope_ext(
            self._pointer, values, positions, divisors, dims, mode, 0, 1.0, 1.0, 0.0, magnitude, 32.0, 1.0
        )
        return self.over(made, values)

    def attention(self, query: int, keys: int, values: int, mask: int, scale: float, cap: float) -> int:
        """ggml's flash attention: `[value, heads, tokens]`."""
        return self.new(self.library.ggml_flash_attn_ext(self._pointer, query, keys, values, mask, scale, 0.0, cap))

    def add_sinks(self, attention: int, sinks: torch.Tensor) -> None:
        """Let an `attention` have a logit more for each head."""
        self.library.ggml_flash_attn_ext_add_sinks(attention, self.constant(sinks, sinks.numel()))

    def delta_rule(
        self, query: int, key: int, value: int, decay: int, beta: int, state: Region, sizes: tuple[int, int, int]
    ) -> int:
        """The gated delta rule for values of `sizes` `[width, heads, tokens]`, whose answers have the same.

        Value head `h` asks key head `h % num_key_heads`. `state` `[width, width, heads]`, keys innermost, is read and
        written in place, as ggml begins each head by copying its matrix to the result (0.15 to 0.21 do); answers are in
        front of it, so that there has to be room for them.
        """
        width, heads, tokens = sizes
        before = self.input(state, width, width, heads)
        made = self.library.ggml_gated_delta_net(self._pointer, query, key, value, decay, beta, before, 1)
        made = self.at(made, state, -4 * width * heads * tokens)
        return self.view(made, sizes, (4 * width, 4 * width * heads))

    def graph(self, pool: Pool, *results: int, is_short: bool) -> PlacedGraph:
        """What computes `results`, in this order; nothing is added afterwards."""
        graph = Graph(pool, self.context, *results, is_short=is_short)
        self.workspace.reserve(self._num_bytes)
        return PlacedGraph(graph, dict(self._places), self._moving, list(self.constants.values()))


RotaryArguments = tuple[int, int, int, float]
"""Divisors of frequencies, rotated dimensions, ggml's mode, and what is multiplied by."""


class PlacedGraph:
    """A graph whose tensors follow the memory that they lie in."""

    def __init__(
        self,
        graph: Graph,
        places: dict[int, tuple[Region, int]],
        moving: list[tuple[int, Region, int, int]],
        kept: list[object],
    ) -> None:
        self._graph, self._kept = graph, kept
        self._regions = list(dict.fromkeys(region for region, _ in places.values()))
        self._fields = [(data_of(tensor), region, place) for tensor, (region, place) in places.items()]
        self._moving = [(data_of(tensor), region, offset, stride) for tensor, region, offset, stride in moving]
        self._placed: list[int] = []

    def plan(self) -> None:
        """Plan it anew, see `Graph.plan`."""
        self._graph.plan()

    def compute(self, position: int) -> None:
        """Run with what is in the regions; `position` says where moving tensors are."""
        addresses = [region.address for region in self._regions]
        if addresses != self._placed:
            self._placed = []  # should it be interrupted
            for field, region, place in self._fields:
                field.value = region.address + place
            self._placed = addresses
        for field, region, offset, stride in self._moving:
            field.value = region.address + offset + position * stride
        self._graph.compute()
