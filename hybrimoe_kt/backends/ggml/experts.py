"""A layer's routed experts as graphs: pairs of a token and an expert in, their unweighted answers out."""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from dataclasses import dataclass

import torch

from hybrimoe_kt.device.experts import LayerExperts
from hybrimoe_kt.expert_form import SWIGLU, ExpertForm

from .activations import Chain, join
from .library import F32, I32, Context, data_of
from .pool import FEW_TOKENS, Graph, Pool

__all__ = ["ExpertGraph", "ExpertGraphs", "ExpertKind", "Scratch", "SumGraph"]

_MOST_TENSORS = 24
"""Of one graph: its inputs, and what each operation makes."""
_MOST_GRAPHS = 64
"""Kept, the latest used; one takes 30 us to make."""


@dataclass(frozen=True, slots=True)
class ExpertKind:
    """All that a graph depends on but the number of tokens: layers that are alike share theirs."""

    num_experts: int
    hidden: int
    inter: int
    types: tuple[int, ...]
    """Of gate, if there is one, up and down."""
    form: ExpertForm = SWIGLU

    @classmethod
    def of(cls, experts: LayerExperts) -> ExpertKind:
        types = tuple(matrix.ggml_type for matrix in experts.matrices)
        return cls(experts.num_experts, experts.hidden, experts.inter, types, experts.form)


class Scratch:
    """Memory for what lies between an expert's matrices, and for answers; grows, and is one call's at a time."""

    def __init__(self) -> None:
        self.memory, self._num_values, self._address = torch.empty(0), 0, 0
        """float32."""

    def reserve(self, num_values: int) -> int:
        """Have so many values, and return their address; both are valid until the next call."""
        if num_values > self._num_values:
            self.memory, self._num_values = torch.empty(num_values), num_values
            self._address = self.memory.data_ptr()
        return self._address


class _Nodes:
    """The tensors of a graph from hidden states to what each expert makes of them; fields say where values are."""

    def __init__(self, context: Context, kind: ExpertKind, per_token: int, tokens: int) -> None:
        shapes = [(kind.hidden, kind.inter)] * (len(kind.types) - 1) + [(kind.inter, kind.hidden)]
        weights = [
            context.tensor(ggml_type, *shape, kind.num_experts)
            for ggml_type, shape in zip(kind.types, shapes, strict=True)
        ]
        biases = [context.tensor(F32, rows, kind.num_experts) for _, rows in shapes if kind.form.has_biases]
        hidden, ids = context.tensor(F32, kind.hidden, 1, tokens), context.tensor(I32, per_token, tokens)

        def product(number: int, states: int) -> Chain:
            chain = Chain(context)
            chain.then("mul_mat_id", weights[number], states, ids, is_first=True)
            return chain.then("add_id", biases[number], ids) if biases else chain

        self._first, *rest = (product(number, hidden) for number in range(len(weights) - 1))
        self._second = rest[0] if rest else Chain(context)
        join(kind.form, self._first, self._second)
        self._answers = product(len(weights) - 1, self._first.last)
        self.out = self._answers.last
        self.weights = [data_of(weight) for weight in (*weights, *biases)]
        self.hidden, self.ids = data_of(hidden), data_of(ids)
        self._inner, self._placed = per_token * tokens * kind.inter, 0
        self._num_values = 2 * self._inner + per_token * tokens * kind.hidden

    def place_between(self, scratch: Scratch) -> None:
        """Say where what lies between is, and all pairs' answers."""
        address = scratch.reserve(self._num_values)
        if address != self._placed:
            for number, chain in enumerate((self._first, self._second, self._answers)):
                chain.place(address + 4 * number * self._inner)
            self._placed = address

    def answers(self, scratch: Scratch) -> torch.Tensor:
        """All pairs' answers, `[pairs * hidden]`, once computed."""
        return scratch.memory[2 * self._inner : self._num_values]


class ExpertGraph:
    """Experts of one kind for `tokens` tokens of `per_token` experts each; answers are unweighted."""

    def __init__(self, on: Pool, kind: ExpertKind, per_token: int, tokens: int) -> None:
        context = Context(on.library, _MOST_TENSORS)
        self._nodes, self._shape = _Nodes(context, kind, per_token, tokens), (tokens, per_token, kind.hidden)
        self._graph = Graph(on, context, self._nodes.out, is_short=tokens <= FEW_TOKENS)

    def place(
        self, weights: tuple[int, ...], hidden: torch.Tensor, ids: torch.Tensor, scratch: Scratch
    ) -> torch.Tensor:
        """Say where everything is; return where answers will be, `[tokens, per_token, hidden]`.

        `weights` are the addresses of matrices and biases, in the order of `LayerExperts.tensors`, `hidden` float32
        `[tokens, hidden]`, `ids` int32 `[tokens, per_token]`, all contiguous and alive until `compute` has ended.
        """
        nodes = self._nodes
        for field, weight in zip(nodes.weights, weights, strict=True):
            field.value = weight
        nodes.hidden.value, nodes.ids.value = hidden.data_ptr(), ids.data_ptr()
        nodes.place_between(scratch)
        return nodes.answers(scratch).view(self._shape)

    def compute(self) -> None:
        self._graph.compute()


class SumGraph:
    """Experts of one kind for a few tokens, and the weighted sum of each token's answers.

    What it is given in numbers stays where it is from call to call; what lies between is in memory of all of them.
    """

    def __init__(self, on: Pool, kind: ExpertKind, per_token: int, tokens: int) -> None:
        context = Context(on.library, _MOST_TENSORS)
        nodes = self._nodes = _Nodes(context, kind, per_token, tokens)
        shares = context.tensor(F32, 1, per_token, tokens)
        out = on.library.ggml_out_prod(context.pointer, nodes.out, shares)
        pairs = per_token * tokens
        self._chosen, self._shares = (ctypes.c_int32 * pairs)(), (ctypes.c_float * pairs)()
        nodes.ids.value, data_of(shares).value = ctypes.addressof(self._chosen), ctypes.addressof(self._shares)
        self._out = data_of(out)
        self._graph = Graph(on, context, out, is_short=True)

    def place(
        self,
        weights: tuple[int, ...],
        hidden: torch.Tensor,
        chosen: list[int],
        shares: list[float],
        out: torch.Tensor,
        scratch: Scratch,
    ) -> None:
        """Say what one call computes: the experts `chosen` with their `shares`, into `out` float32 `[tokens, hidden]`.

        Token by token; `weights` and `hidden` as of `ExpertGraph`.
        """
        nodes = self._nodes
        for field, weight in zip(nodes.weights, weights, strict=True):
            field.value = weight
        nodes.hidden.value, self._out.value = hidden.data_ptr(), out.data_ptr()
        nodes.place_between(scratch)
        self._chosen[:], self._shares[:] = chosen, shares  # type: ignore[assignment]  # typeshed: not of numbers alone

    def compute(self) -> None:
        self._graph.compute()


class ExpertGraphs:
    """Graphs by kind and size, made when they are first wanted."""

    def __init__(self, on: Pool) -> None:
        self._pool, self._kinds = on, dict[ExpertKind, int]()
        self._made: OrderedDict[tuple[int, int, int], ExpertGraph] = OrderedDict()
        self._sums: OrderedDict[tuple[int, int, int], SumGraph] = OrderedDict()

    def number_of(self, kind: ExpertKind) -> int:
        """What stands for a kind from now on; numbers are found sooner."""
        return self._kinds.setdefault(kind, len(self._kinds))

    def sum_of(self, kind: ExpertKind, number: int, per_token: int, tokens: int) -> SumGraph:
        """For up to `FEW_TOKENS` tokens, all of whose experts are computed."""
        key = number, per_token, tokens
        found = self._sums.get(key)
        if found is None:
            found = self._sums[key] = SumGraph(self._pool, kind, per_token, tokens)
            if len(self._sums) > _MOST_GRAPHS:
                self._sums.popitem(last=False)
        else:
            self._sums.move_to_end(key)
        return found

    def of(self, kind: ExpertKind, number: int, per_token: int, tokens: int) -> ExpertGraph:
        key = number, per_token, tokens
        found = self._made.get(key)
        if found is None:
            found = self._made[key] = ExpertGraph(self._pool, kind, per_token, tokens)
            if len(self._made) > _MOST_GRAPHS:
                self._made.popitem(last=False)
        else:
            self._made.move_to_end(key)
        return found
