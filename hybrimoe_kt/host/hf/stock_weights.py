"""Weights of Transformers' modules as graphs take them: matrices as they are kept, norms, small float parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from hybrimoe_kt.backends.ggml.library import BF16, F16, F32
from hybrimoe_kt.backends.ggml.parts import Matrix, Norm
from hybrimoe_kt.device.packed import PackedMatrix
from hybrimoe_kt.operators.linear import QuantizedLinear

__all__ = [
    "NotDescribed",
    "first_of",
    "float32_of",
    "matrix_in",
    "matrix_of",
    "norm_of",
    "on_cpu",
    "optional_of",
    "ordered_of",
    "packed_of",
    "row_order_of",
]


_NUMBERS = {torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16}


class NotDescribed(Exception):
    """A layer has something that no graph here does; says what."""


def first_of(module: Any, names: Iterable[str], default: Any) -> Any:
    """The first of these attributes that is there and not None."""
    return next((found for name in names if (found := getattr(module, name, None)) is not None), default)


def norm_of(module: Any, offset: float) -> Norm:
    """A norm by root mean square, `offset` added to its weights."""
    if getattr(module, "bias", None) is not None:
        raise NotDescribed("its norms have biases")
    epsilon = first_of(module, ("variance_epsilon", "eps"), None)
    if epsilon is None:
        raise NotDescribed(f"its norms are {type(module).__name__}")
    factors = float32_of(module.weight, "its norms")
    return Norm(factors + offset if offset else factors, float(epsilon))


def matrix_of(linear: nn.Module, name: str) -> Matrix:
    """A linear layer as it is kept; in the order that the model wants."""
    matrix, order = ordered_of(linear, name)
    if order is not None:
        raise NotDescribed(f"the rows of {name} stand in another order")
    return matrix


def matrix_in(linear: Any, name: str, rows: torch.Tensor | None = None, columns: torch.Tensor | None = None) -> Matrix:
    """A linear layer in the order that a `PackedWeight` names by these; floats are copied into it. Without a bias."""
    if linear.bias is not None:
        raise NotDescribed(f"{name} has a bias")
    packed = linear.packed if isinstance(linear, QuantizedLinear) else None
    if packed is None:
        if rows is None and columns is None:
            return matrix_of(linear, name)
        weight = on_cpu(linear.weight, name)
        weight = weight if rows is None else weight[rows.argsort()]
        weight = weight if columns is None else weight[:, columns]
        return Matrix((packed_of(weight.contiguous(), name),))
    if not (_are_same(packed.row_order, rows) and _are_same(packed.column_order, columns)):
        raise NotDescribed(f"the rows or columns of {name} stand in an unknown order")
    return Matrix(packed.parts)


def _are_same(found: torch.Tensor | None, wanted: torch.Tensor | None) -> bool:
    """Whether two orders are; None is that of numbers."""
    known = [order for order in (found, wanted) if order is not None]
    return not known or torch.equal(known[0], known[1] if len(known) > 1 else torch.arange(len(known[0]), device="cpu"))


def row_order_of(linear: Any) -> torch.Tensor | None:
    """In which order the rows are, of a layer that stays as the file has it; None: as the model has them."""
    order = linear.packed.row_order if isinstance(linear, QuantizedLinear) and linear.packed is not None else None
    return None if _are_same(order, None) else order


def ordered_of(linear: Any, name: str) -> tuple[Matrix, torch.Tensor | None]:
    """A linear layer as it is kept, and the order of its rows."""
    bias = optional_of(linear.bias)
    packed = linear.packed if isinstance(linear, QuantizedLinear) else None
    if packed is None:
        if not isinstance(linear, nn.Linear | QuantizedLinear):
            raise NotDescribed(f"{name} is {type(linear).__name__}")
        return Matrix((packed_of(on_cpu(linear.weight, name), name),), bias), None
    if packed.column_order is not None:
        raise NotDescribed(f"the columns of {name} stand in another order")
    return Matrix(packed.parts, bias), packed.row_order


def packed_of(values: torch.Tensor, name: str) -> PackedMatrix:
    """Floats `[rows, columns]`, or such of each head, as a matrix of a file; in place."""
    heads = values.shape[0] if values.dim() == 3 else 1
    rows, columns = values.shape[-2:]
    return PackedMatrix(name, values.view(torch.uint8).flatten(), _NUMBERS[values.dtype], rows, columns, heads)


def on_cpu(values: torch.Tensor, name: str) -> torch.Tensor:
    """Floats that graphs take in place, in their own type; NotDescribed for any other."""
    if values.device.type != "cpu" or values.dtype not in _NUMBERS:
        raise NotDescribed(f"{name} are {values.dtype} on {values.device}, which graphs do not take")
    return values.detach().contiguous()


def float32_of(values: torch.Tensor, name: str) -> torch.Tensor:
    """Few values, as float32: in place where they are."""
    return on_cpu(values, name).float()


def optional_of(values: torch.Tensor | None) -> torch.Tensor | None:
    """The same of what need not be there."""
    return None if values is None else float32_of(values, "its biases or sinks")
