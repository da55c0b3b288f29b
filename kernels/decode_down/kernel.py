"""Decode, second half: a token's down projections, weighted and summed by the program that owns the output rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hybrimoe_kt.kernels.between import PLAIN, Between
from hybrimoe_kt.kernels.configs import DecodeConfig
from hybrimoe_kt.kernels.quants.dispatch import unit_dots, values_per_unit
from hybrimoe_kt.kernels.workspace import MatrixInSlot

__all__ = ["decode_down", "decode_down_kernel"]


@triton.jit
def decode_down_kernel(
    memory,
    slot_bytes,
    tables,
    pair_slot,
    weights,
    top_k,
    x,
    xq,
    xs,
    xm,
    inter,
    hidden,
    o0,
    o1,
    o2,
    o3,
    down_bias,
    out,
    CLEARS: tl.constexpr,
    BIASED: tl.constexpr,
    DOWN: tl.constexpr,
    FORM: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Program (row block, token): no other writes these outputs, so experts add up in order, without atomics."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    token = tl.program_id(1).to(tl.int64)
    rows = tl.minimum(row, hidden - 1)[:, None]
    num_units = inter // values_per_unit(DOWN)
    total = tl.zeros([ROWS, UNITS], tl.float32)
    biases = tl.zeros([ROWS], tl.float32)
    for place in range(0, top_k):
        pair = token * top_k + place
        slot = tl.load(pair_slot + pair)
        if slot >= 0:
            weight = tl.load(weights + pair)
            mem = memory + slot.to(tl.int64) * slot_bytes
            pair_x = tl.multiple_of(x + pair * inter, 16)
            pair_xq = tl.multiple_of(xq + pair * (inter // 4), 16)
            pair_xs = xs + pair * (inter // 32)
            pair_xm = xm + pair * (inter // 32)
            for first in range(0, num_units, UNITS):
                unit = first + tl.arange(0, UNITS)[None, :]
                inside = tl.minimum(unit, num_units - 1)
                dots = unit_dots(
                    DOWN, FORM, mem, tables, o0, o1, o2, o3, rows, inside, inter, pair_x, pair_xq, pair_xs, pair_xm
                )
                total += tl.where(unit < num_units, weight * dots, 0.0)
            if BIASED:
                bias_at = (mem + down_bias).to(tl.pointer_type(tl.float32)) + tl.minimum(row, hidden - 1)
                biases += weight * tl.load(bias_at)
    out_at = out + token * hidden + row
    answer = tl.sum(total, axis=1)
    if BIASED:
        answer += biases
    if not CLEARS:
        answer += tl.load(out_at, mask=row < hidden, other=0.0)
    tl.store(out_at, answer, mask=row < hidden)


def decode_down(
    memory: torch.Tensor,
    tables: torch.Tensor,
    down: MatrixInSlot,
    pair_slot: torch.Tensor,
    weights: torch.Tensor,
    act: torch.Tensor,
    quantized: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    out: torch.Tensor,
    config: DecodeConfig,
    *,
    clears: bool = False,
    between: Between = PLAIN,
) -> None:
    """Add the weighted sum over pairs that have a slot to `out` float32 `[T, H]`, or write it there: `clears`.

    `pair_slot` int32 `[T * K]` and `act` float32 `[T * K, inter]` as decode_gate_up wrote them, `quantized` the
    latter's int8 form (unused where down is F16 or BF16), `weights` float32 `[T, K]`.
    """
    xq, xs, xm = quantized
    num_tokens, top_k = weights.shape
    grid = (triton.cdiv(down.rows, config.rows), num_tokens)
    decode_down_kernel[grid](
        memory,
        memory.shape[1],
        tables,
        pair_slot,
        weights,
        top_k,
        act,
        xq,
        xs,
        xm,
        down.columns,
        down.rows,
        *down.offsets,
        between.down_bias,
        out,
        CLEARS=clears,
        BIASED=between.form.has_biases,
        DOWN=down.type.number,
        FORM=config.form,
        ROWS=config.rows,
        UNITS=config.units,
        num_warps=config.num_warps,
    )
