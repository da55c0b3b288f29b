"""Reads Transformers' gated linear attention as parts: in the order of the file's heads where the file has another."""

from __future__ import annotations

from typing import Any

import torch

from hybrimoe_kt.backends.ggml.parts import GatedLinear, Matrix
from hybrimoe_kt.operators.stored_state import StateLayout

from .stock_weights import NotDescribed, float32_of, matrix_in, norm_of, row_order_of

__all__ = ["gated_linear"]


def gated_linear(module: Any) -> tuple[GatedLinear, StateLayout]:
    """Qwen3-Next's and Qwen3.5-MoE's; NotDescribed where something is not known here."""
    if not hasattr(module, "conv1d") or not hasattr(module, "A_log"):
        raise NotDescribed(f"its attention is {type(module).__name__}")
    if module.head_k_dim != module.head_v_dim:
        raise NotDescribed(f"its keys are {module.head_k_dim} wide and its values {module.head_v_dim}")
    if module.conv1d.bias is not None:
        raise NotDescribed("its convolution has a bias")
    return _by_key_head(module) if hasattr(module, "in_proj_qkvz") else _by_kind(module)


def _by_key_head(module: Any) -> tuple[GatedLinear, StateLayout]:
    """One matrix with each key head's query, key, values and gates: all queries, all keys, ... in a file."""
    keys, width = module.num_k_heads, module.head_k_dim
    values = module.num_v_heads // keys
    found = torch.arange(keys * (2 + 2 * values), device="cpu").view(keys, -1)
    order = torch.cat([part.flatten() for part in found.split((1, 1, values, values), dim=1)])
    gate = None
    if row_order_of(module.in_proj_qkvz) is None:
        inputs = matrix_in(module.in_proj_qkvz, "in_proj_qkvz")
    else:
        both = matrix_in(module.in_proj_qkvz, "in_proj_qkvz", rows=_rows(order.argsort(), width))
        inputs, gate = Matrix(both.parts[:1]), Matrix(both.parts[1:])
        if inputs.rows != (2 * keys + module.num_v_heads) * width:
            raise NotDescribed("the file splits its inputs in an unknown way")
    rates = matrix_in(module.in_proj_ba, "in_proj_ba")
    output = matrix_in(module.out_proj, "out_proj")
    return _made(module, inputs, gate, rates, output, None, None if gate else order.int())


def _by_kind(module: Any) -> tuple[GatedLinear, StateLayout]:
    """A matrix a kind. The first value head of every key head comes first in a file, then the second of each, ..."""
    keys, width = module.num_k_heads, module.head_k_dim
    heads = None
    if row_order_of(module.in_proj_qkv) is not None:
        heads = torch.arange(module.num_v_heads, device="cpu").view(-1, keys).t().flatten()
    rows = None if heads is None else _rows(heads, width)
    inputs = matrix_in(module.in_proj_qkv, "in_proj_qkv", rows=_channels(module, heads))
    gate = matrix_in(module.in_proj_z, "in_proj_z", rows=rows)
    betas, decays = (matrix_in(getattr(module, name), name, rows=heads) for name in ("in_proj_b", "in_proj_a"))
    output = matrix_in(module.out_proj, "out_proj", columns=None if rows is None else rows.argsort())
    return _made(module, inputs, gate, Matrix((*betas.parts, *decays.parts)), output, heads, None)


def _made(
    module: Any,
    inputs: Matrix,
    gate: Matrix | None,
    rates: Matrix,
    output: Matrix,
    heads: torch.Tensor | None,
    order: torch.Tensor | None,
) -> tuple[GatedLinear, StateLayout]:
    """`heads`: where each of Transformers' value heads is in the file."""
    channels = _channels(module, heads)
    kernel = float32_of(module.conv1d.weight, "its convolution")[:, 0].t()
    decay = -float32_of(module.A_log, "its decays").exp()
    bias = float32_of(module.dt_bias, "its decays")
    if heads is not None and channels is not None:
        kernel, decay, bias = kernel[:, channels.argsort()], decay[heads.argsort()], bias[heads.argsort()]
    parts = GatedLinear(
        inputs,
        gate,
        rates,
        module.num_v_heads // module.num_k_heads if hasattr(module, "in_proj_ba") else module.num_v_heads,
        output,
        kernel.contiguous(),
        decay,
        bias,
        norm_of(module.norm, 0.0),
        module.num_k_heads,
        module.num_v_heads,
        module.head_k_dim,
        heads is not None,
        order,
    )
    return parts, StateLayout(heads, channels)


def _channels(module: Any, heads: torch.Tensor | None) -> torch.Tensor | None:
    """Where each channel of queries, keys and values is in the file."""
    if heads is None:
        return None
    keys = 2 * module.key_dim
    return torch.cat((torch.arange(keys, device="cpu"), keys + _rows(heads, module.head_v_dim)))


def _rows(heads: torch.Tensor, width: int) -> torch.Tensor:
    """The rows of heads, for their numbers."""
    return (heads[:, None] * width + torch.arange(width, device="cpu")).flatten()
