"""Linear layers of one module that are given the same input, multiplied together when the first of them is asked."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from hybrimoe_kt.backends.gpu_dense import DenseProduct
from hybrimoe_kt.device.dense_matrices import DenseMatrices

from .linear import QuantizedLinear

__all__ = ["SharedInput"]


class SharedInput:
    """Keeps what the others will ask for until they have; the same tensor object is the same input.

    Layers that are asked with another input, or again, are computed anew: right, if slower.
    """

    def __init__(self, layers: Sequence[QuantizedLinear], matrices: DenseMatrices, product: DenseProduct) -> None:
        """`matrices` has the layers' weights in this order; attaches itself to them."""
        self._matrices, self._product = matrices, product
        orders = {id(order): order for weight in matrices.weights if (order := weight.column_order) is not None}
        assert not orders or len(layers) == 1, "inputs in several orders are several inputs"
        self._column_order = next(iter(orders.values())).to(matrices.memory.device) if orders else None
        self._given: torch.Tensor | None = None
        self._out: torch.Tensor | None = None
        self._left: set[int] = set()
        gated = self._ask_gated if len(layers) == 1 and self._column_order is None else None
        for number, layer in enumerate(layers):
            layer.attach(functools.partial(self._ask, number), gated)
        self._all = frozenset(range(len(layers)))

    def _ask(self, number: int, given: torch.Tensor) -> torch.Tensor:
        if given is not self._given or number not in self._left:
            rows = given.reshape(-1, given.shape[-1])
            if self._column_order is not None:
                rows = rows[:, self._column_order]
            self._out, self._given, self._left = self._product(rows.contiguous()), given, set(self._all)
        assert self._out is not None, "computed above"
        answer = self._matrices.features(number, self._out)
        self._left.discard(number)
        if not self._left:
            self._given = self._out = None
        return answer.view(*given.shape[:-1], answer.shape[-1])

    def _ask_gated(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Of the one layer, for silu(gate) * up."""
        out = self._product(gate.reshape(-1, gate.shape[-1]), up.reshape(-1, up.shape[-1]))
        answer = self._matrices.features(0, out)
        return answer.view(*gate.shape[:-1], answer.shape[-1])
