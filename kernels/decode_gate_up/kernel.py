"""Decode, first half: every (token, expert) pair's gate and up rows, joined, in one pass over the weights."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hybrimoe_kt.kernels.between import PLAIN, Between
from hybrimoe_kt.kernels.blocks.activation import joined
from hybrimoe_kt.kernels.configs import DecodeConfig
from hybrimoe_kt.kernels.quants.dispatch import unit_dots, values_per_unit
from hybrimoe_kt.kernels.workspace import MatrixInSlot

__all__ = ["decode_gate_up", "decode_gate_up_kernel"]


@triton.jit
def decode_gate_up_kernel(
    memory,
    slot_bytes,
    tables,
    slot_of,
    ids,
    num_experts,
    top_k,
    x,
    xq,
    xs,
    xm,
    hidden,
    inter,
    g0,
    g1,
    g2,
    g3,
    u0,
    u1,
    u2,
    u3,
    gate_bias,
    up_bias,
    act,
    pair_slot,
    GATE: tl.constexpr,
    UP: tl.constexpr,
    GATED: tl.constexpr,
    BIASED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    GATE_LIMIT: tl.constexpr,
    OFFSET: tl.constexpr,
    FORM: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Program (pair, row block); pairs vary fastest, so tokens that share an expert read it from the L2 cache."""
    pair = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    token = (pair // top_k).to(tl.int64)
    expert = tl.load(ids + pair).to(tl.int32)
    known = (expert >= 0) & (expert < num_experts)
    slot = tl.load(slot_of + expert, mask=known, other=-1)
    if tl.program_id(1) == 0:
        tl.store(pair_slot + pair, slot)
    act_at = act + pair.to(tl.int64) * inter + row
    if slot < 0:
        tl.store(act_at, tl.zeros([ROWS], tl.float32), mask=row < inter)
        return
    mem = memory + slot.to(tl.int64) * slot_bytes
    x = tl.multiple_of(x + token * hidden, 16)
    xq = tl.multiple_of(xq + token * (hidden // 4), 16)
    xs += token * (hidden // 32)
    xm += token * (hidden // 32)
    gate = tl.zeros([ROWS, UNITS], tl.float32)
    up = tl.zeros([ROWS, UNITS], tl.float32)
    rows = tl.minimum(row, inter - 1)[:, None]
    if GATED:
        num_units = hidden // values_per_unit(GATE)
        for first in range(0, num_units, UNITS):
            unit = first + tl.arange(0, UNITS)[None, :]
            inside = tl.minimum(unit, num_units - 1)
            dots = unit_dots(GATE, FORM, mem, tables, g0, g1, g2, g3, rows, inside, hidden, x, xq, xs, xm)
            gate += tl.where(unit < num_units, dots, 0.0)
            if GATE == UP:
                dots = unit_dots(UP, FORM, mem, tables, u0, u1, u2, u3, rows, inside, hidden, x, xq, xs, xm)
                up += tl.where(unit < num_units, dots, 0.0)
    if GATE != UP or not GATED:
        num_units = hidden // values_per_unit(UP)
        for first in range(0, num_units, UNITS):
            unit = first + tl.arange(0, UNITS)[None, :]
            inside = tl.minimum(unit, num_units - 1)
            dots = unit_dots(UP, FORM, mem, tables, u0, u1, u2, u3, rows, inside, hidden, x, xq, xs, xm)
            up += tl.where(unit < num_units, dots, 0.0)
    gate_sum, up_sum = tl.sum(gate, axis=1), tl.sum(up, axis=1)
    if BIASED:
        bias_at = tl.minimum(row, inter - 1)
        up_sum += tl.load((mem + up_bias).to(tl.pointer_type(tl.float32)) + bias_at)
        if GATED:
            gate_sum += tl.load((mem + gate_bias).to(tl.pointer_type(tl.float32)) + bias_at)
    values = joined(gate_sum, up_sum, GATED, ACTIVATION, ALPHA, LIMIT, GATE_LIMIT, OFFSET)
    tl.store(act_at, values, mask=row < inter)


def decode_gate_up(
    memory: torch.Tensor,
    tables: torch.Tensor,
    gate: MatrixInSlot | None,
    up: MatrixInSlot,
    slot_of: torch.Tensor,
    ids: torch.Tensor,
    x: torch.Tensor,
    quantized: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    act: torch.Tensor,
    pair_slot: torch.Tensor,
    config: DecodeConfig,
    between: Between = PLAIN,
) -> None:
    """Write `act` float32 `[T * K, inter]` and `pair_slot` int32 `[T * K]`; zeros and -1 for pairs without a slot.

    `memory` uint8 `[num_slots, slot_bytes]`, `ids` int64 `[T, K]`, `x [T, H]`, `quantized` = int8 as words
    int32 `[T, H / 4]`, float32 scales and sums `[T, H / 32]` (unused, of any size, where gate and up are F16 or BF16).
    `gate` None: the experts have none, as `between` says.
    """
    xq, xs, xm = quantized
    first = gate or up
    grid = (ids.numel(), triton.cdiv(up.rows, config.rows))
    decode_gate_up_kernel[grid](
        memory,
        memory.shape[1],
        tables,
        slot_of,
        ids,
        slot_of.shape[0],
        ids.shape[1],
        x,
        xq,
        xs,
        xm,
        up.columns,
        up.rows,
        *first.offsets,
        *up.offsets,
        *between.biases,
        act,
        pair_slot,
        GATE=first.type.number,
        UP=up.type.number,
        **between.constants,
        FORM=config.form,
        ROWS=config.rows,
        UNITS=config.units,
        num_warps=config.num_warps,
    )
