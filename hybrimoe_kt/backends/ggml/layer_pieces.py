"""What layers and heads are made of, each a few operations of a graph."""

from __future__ import annotations

from .building import Builder
from .parts import Matrix, Norm, SharedExpert, Swiglu

__all__ = ["linear", "norm_of", "shared_expert", "swiglu"]


def norm_of(builder: Builder, values: int, norm: Norm, *, in_place: bool = False) -> int:
    normed = builder.normalised(values, norm.epsilon, in_place=in_place)
    return builder.times(normed, builder.constant(norm.factors, norm.factors.numel()))


def linear(builder: Builder, matrix: Matrix, given: int) -> int:
    """`[rows, tokens]`."""
    out: int | None = None
    for part in matrix.parts:
        weight = builder.constant(part.data, part.columns, part.rows, ggml_type=part.ggml_type)
        product = builder.product(weight, given)
        out = product if out is None else builder.joined(out, product)
    assert out is not None, "a matrix has parts"
    return out if matrix.bias is None else builder.plus(out, builder.constant(matrix.bias, matrix.rows))


def swiglu(builder: Builder, parts: Swiglu, given: int) -> int:
    joined = builder.swiglu(linear(builder, parts.gate, given), linear(builder, parts.up, given))
    return linear(builder, parts.down, joined)


def shared_expert(builder: Builder, parts: SharedExpert, given: int) -> int:
    answer = swiglu(builder, parts.body, given)
    if parts.gate is None:
        return answer
    return builder.times(answer, builder.sigmoid(linear(builder, parts.gate, given)))
