"""What joins an expert's gate and up: one function of the form's four numbers, which are constants of a kernel."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["joined"]


@triton.jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _gelu_tanh(x):
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x * tl.sigmoid(2.0 * inner)  # 0.5 * (1 + tanh(y)) is sigmoid(2 y)


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr):
    if ACTIVATION == 1:
        return _gelu(x)
    elif ACTIVATION == 2:
        return _gelu_tanh(x)
    elif ACTIVATION == 3:
        positive = tl.maximum(x, 0.0)
        return positive * positive
    else:
        return x * tl.sigmoid(ALPHA * x)


@triton.jit
def joined(
    gate,
    up,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    GATE_LIMIT: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """`activation(gate) * (up + OFFSET)`, gate cut at GATE_LIMIT and up at both sides of LIMIT, 0 for none; float32.

    Without a gate it is `activation(up)`. ACTIVATION is a place in `ACTIVATIONS` of the experts' form.
    """
    if not GATED:
        return _activated(up, ACTIVATION, ALPHA)
    if LIMIT > 0:
        gate = tl.minimum(gate, GATE_LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
    if OFFSET != 0:
        up = up + OFFSET
    return _activated(gate, ACTIVATION, ALPHA) * up
