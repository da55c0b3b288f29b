"""Products with packed matrices, and their dequantisation, as graphs that are made once for each shape."""

from __future__ import annotations

import functools
import threading

import torch

from hybrimoe_kt.quants import row_bytes

from .library import F32, Context, data_of, library
from .pool import FEW_TOKENS, Graph, Pool, pool

__all__ = ["dequantize_into", "multiply", "multiply_heads", "quantize"]

_MOST_GRAPHS = 1024
"""Kept of a kind, the latest used: a model has some ten shapes, a prompt may have any length. 4 KB each."""
_TINY_VALUES = 2**16
"""Dequantised by one thread: some 20 us. To wake another took 400 us on a virtual machine."""


class _Product:
    """`[heads, tokens, columns]` times packed `[heads, rows, columns]`, transposed: `[heads, tokens, rows]`."""

    def __init__(self, on: Pool, ggml_type: int, heads: int, rows: int, columns: int, tokens: int, stride: int) -> None:
        library, context = on.library, Context(on.library, 4)
        if stride:
            whole = context.tensor(ggml_type, columns, rows, heads)
            row_bytes = library.ggml_nbytes(whole) // (rows * heads)
            weight = library.ggml_view_3d(context.pointer, whole, columns, rows, heads, row_bytes, stride, 0)
        else:
            weight = context.tensor(ggml_type, columns, rows, heads)
        given = context.tensor(F32, columns, tokens, heads)
        out = library.ggml_mul_mat(context.pointer, weight, given)
        self._weight, self._given, self._out = data_of(weight), data_of(given), data_of(out)
        self._graph, self._turn = Graph(on, context, out, is_short=tokens <= FEW_TOKENS), threading.Lock()

    def compute(self, weight: int, given: int, out: int) -> None:
        """Compute with what stands at these addresses; threads with products of one shape take turns."""
        with self._turn:
            self._weight.value, self._given.value, self._out.value = weight, given, out
            self._graph.compute()


class _Dequantisation:
    """Packed values as float32."""

    def __init__(self, on: Pool, ggml_type: int, rows: int, columns: int) -> None:
        context = Context(on.library, 2)
        weight = context.tensor(ggml_type, columns, rows)
        out = on.library.ggml_cast(context.pointer, weight, F32)
        self._weight, self._out = data_of(weight), data_of(out)
        is_tiny = rows * columns <= _TINY_VALUES
        self._graph, self._turn = Graph(on, context, out, is_tiny=is_tiny), threading.Lock()

    def compute(self, weight: int, out: int) -> None:
        """As of `_Product`."""
        with self._turn:
            self._weight.value, self._out.value = weight, out
            self._graph.compute()


_product = functools.lru_cache(_MOST_GRAPHS)(_Product)
_dequantisation = functools.lru_cache(_MOST_GRAPHS)(_Dequantisation)


def multiply(weight: int, ggml_type: int, rows: int, columns: int, given: torch.Tensor, out: torch.Tensor) -> None:
    """Write `given` times the transposed matrix at the address `weight` to `out`, float32 `[tokens, rows]`.

    `given` float32 `[tokens, columns]`; both contiguous on the CPU. Activations are rounded as the type's kernel has
    it: to 8 bits where weights are blocks.
    """
    product = _product(pool(), ggml_type, 1, rows, columns, given.shape[0], 0)
    product.compute(weight, given.data_ptr(), out.data_ptr())


def multiply_heads(
    weight: int, ggml_type: int, rows: int, columns: int, given: torch.Tensor, out: torch.Tensor, stride: int = 0
) -> None:
    """Do that for every head: `given` float32 `[heads, tokens, columns]`, `out` `[heads, tokens, rows]`.

    Heads' matrices lie `stride` bytes apart; 0: one after the other.
    """
    heads, tokens, _ = given.shape
    product = _product(pool(), ggml_type, heads, rows, columns, tokens, stride)
    product.compute(weight, given.data_ptr(), out.data_ptr())


def dequantize_into(weight: int, ggml_type: int, rows: int, columns: int, out: torch.Tensor) -> None:
    """Write the values of the packed matrix at the address `weight` to `out`, float32 `[rows, columns]`."""
    _dequantisation(pool(), ggml_type, rows, columns).compute(weight, out.data_ptr())


def quantize(values: torch.Tensor, ggml_type: int) -> torch.Tensor:
    """Pack float32 `[rows, columns]` into blocks, uint8 `[rows, bytes of a row]`."""
    rows, columns = values.shape
    packed = torch.empty(rows, row_bytes(ggml_type, columns), dtype=torch.uint8)
    if rows:
        given = values.contiguous()
        library().ggml_quantize_chunk(ggml_type, given.data_ptr(), packed.data_ptr(), 0, rows, columns, None)
    return packed
