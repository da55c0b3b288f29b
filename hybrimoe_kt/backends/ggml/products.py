"""Products with one packed matrix, and its dequantisation, as graphs that are made once for each shape."""

from __future__ import annotations

import functools
from collections import OrderedDict

import torch

from .library import F32, Context, data_of
from .pool import Graph, Pool, pool

__all__ = ["dequantize_into", "multiply"]

_MOST_GRAPHS = 512
"""Kept of a kind, the latest used: a model has some ten shapes, a prompt may have any length. 3 KB each."""


class _Product:
    """`[tokens, columns]` times a packed `[rows, columns]`, transposed: `[tokens, rows]`."""

    def __init__(self, on: Pool, ggml_type: int, rows: int, columns: int, tokens: int) -> None:
        context = Context(on.library, 3)
        weight, given = context.tensor(ggml_type, columns, rows), context.tensor(F32, columns, tokens)
        out = on.library.ggml_mul_mat(context.pointer, weight, given)
        self.weight, self.given, self.out = data_of(weight), data_of(given), data_of(out)
        self.compute = Graph(on, context, out).compute


class _Dequantisation:
    """Packed values as float32."""

    def __init__(self, on: Pool, ggml_type: int, rows: int, columns: int) -> None:
        context = Context(on.library, 2)
        weight = context.tensor(ggml_type, columns, rows)
        out = on.library.ggml_cast(context.pointer, weight, F32)
        self.weight, self.out = data_of(weight), data_of(out)
        self.compute = Graph(on, context, out).compute


@functools.lru_cache(_MOST_GRAPHS)
def _product(ggml_type: int, rows: int, columns: int, tokens: int) -> _Product:
    return _Product(pool(), ggml_type, rows, columns, tokens)


@functools.lru_cache(_MOST_GRAPHS)
def _dequantisation(ggml_type: int, rows: int, columns: int) -> _Dequantisation:
    return _Dequantisation(pool(), ggml_type, rows, columns)


def multiply(weight: int, ggml_type: int, rows: int, columns: int, given: torch.Tensor, out: torch.Tensor) -> None:
    """Write `given` times the transposed matrix at the address `weight` to `out`, float32 `[tokens, rows]`.

    `given` float32 `[tokens, columns]`; both contiguous on the CPU. Activations are rounded as the type's kernel has it.
    """
    product = _product(ggml_type, rows, columns, given.shape[0])
    product.weight.value, product.given.value, product.out.value = weight, given.data_ptr(), out.data_ptr()
    product.compute()


def dequantize_into(weight: int, ggml_type: int, rows: int, columns: int, out: torch.Tensor) -> None:
    """Write the values of the packed matrix at the address `weight` to `out`, float32 `[rows, columns]`."""
    made = _dequantisation(ggml_type, rows, columns)
    made.weight.value, made.out.value = weight, out.data_ptr()
    made.compute()
