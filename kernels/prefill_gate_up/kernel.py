"""Prefill, first half: gate and up of a block of one expert's tokens on tensor cores, joined."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hybrimoe_kt.kernels.between import PLAIN, Between
from hybrimoe_kt.kernels.blocks.activation import joined
from hybrimoe_kt.kernels.configs import PrefillConfig
from hybrimoe_kt.kernels.quants.dispatch import step_columns, step_tiles
from hybrimoe_kt.kernels.workspace import MatrixInSlot

__all__ = ["prefill_gate_up", "prefill_gate_up_kernel"]


@triton.jit
def prefill_gate_up_kernel(
    memory,
    slot_bytes,
    tables,
    pairs,
    slots,
    top_k,
    x,
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
    PAIRS: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Program (block of pairs, row block). Weights are the left operand: Hopper reads only that from registers."""
    slot = tl.load(slots + tl.program_id(0))
    if slot < 0:
        return
    mem = memory + slot.to(tl.int64) * slot_bytes
    pair = tl.load(pairs + tl.program_id(0) * PAIRS + tl.arange(0, PAIRS))  # [PAIRS]
    token = tl.maximum(pair, 0) // top_k
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    rows = tl.minimum(row, inter - 1)
    width = hidden // 8 * 8  # the compiler sees that rows begin on 16 bytes
    x_row = tl.multiple_of(x, 16) + (token.to(tl.int64) * width)[None, :]  # [1, PAIRS]
    gate = tl.zeros([ROWS, PAIRS], tl.float32)
    up = tl.zeros([ROWS, PAIRS], tl.float32)
    if GATED:
        for step in range(0, tl.cdiv(hidden, 64)):
            low, high = step_columns(GATE, step)
            x_low = tl.load(x_row + low[:, None], mask=low[:, None] < width, other=0.0)  # [32, PAIRS]
            x_high = tl.load(x_row + high[:, None], mask=high[:, None] < width, other=0.0)
            w_low, w_high = step_tiles(GATE, FORM, mem, tables, g0, g1, g2, g3, rows, step, hidden)
            gate = tl.dot(w_low.to(x_low.dtype), x_low, gate)
            gate = tl.dot(w_high.to(x_low.dtype), x_high, gate)
            if GATE == UP:
                w_low, w_high = step_tiles(UP, FORM, mem, tables, u0, u1, u2, u3, rows, step, hidden)
                up = tl.dot(w_low.to(x_low.dtype), x_low, up)
                up = tl.dot(w_high.to(x_low.dtype), x_high, up)
    if GATE != UP or not GATED:
        for step in range(0, tl.cdiv(hidden, 64)):
            low, high = step_columns(UP, step)
            x_low = tl.load(x_row + low[:, None], mask=low[:, None] < width, other=0.0)
            x_high = tl.load(x_row + high[:, None], mask=high[:, None] < width, other=0.0)
            w_low, w_high = step_tiles(UP, FORM, mem, tables, u0, u1, u2, u3, rows, step, hidden)
            up = tl.dot(w_low.to(x_low.dtype), x_low, up)
            up = tl.dot(w_high.to(x_low.dtype), x_high, up)
    if BIASED:
        up += tl.load((mem + up_bias).to(tl.pointer_type(tl.float32)) + rows)[:, None]
        if GATED:
            gate += tl.load((mem + gate_bias).to(tl.pointer_type(tl.float32)) + rows)[:, None]
    values = joined(gate, up, GATED, ACTIVATION, ALPHA, LIMIT, GATE_LIMIT, OFFSET)
    values = tl.minimum(tl.maximum(values, -LARGEST), LARGEST).to(act.dtype.element_ty)
    features = inter // 8 * 8
    at = (tl.maximum(pair, 0).to(tl.int64) * features)[:, None] + row[None, :]  # [PAIRS, ROWS]
    tl.store(act + at, tl.trans(values), mask=(pair >= 0)[:, None] & (row < features)[None, :])


def prefill_gate_up(
    memory: torch.Tensor,
    tables: torch.Tensor,
    gate: MatrixInSlot | None,
    up: MatrixInSlot,
    pairs: torch.Tensor,
    slots: torch.Tensor,
    top_k: int,
    x: torch.Tensor,
    act: torch.Tensor,
    config: PrefillConfig,
    between: Between = PLAIN,
) -> None:
    """Write what `between` makes of gate and up to the rows of `act [T * K, inter]` that `pairs` names, and no others.

    `memory` uint8 `[num_slots, slot_bytes]`, `pairs` and `slots` from `sort_pairs` with `config.pairs` a block,
    `x [T, H]` and `act` float16 or bfloat16. Values beyond the dtype's range are cut to it. `gate` None: there is none.
    """
    first = gate or up
    grid = (slots.shape[0], triton.cdiv(up.rows, config.rows))
    prefill_gate_up_kernel[grid](
        memory,
        memory.shape[1],
        tables,
        pairs,
        slots,
        top_k,
        x,
        up.columns,
        up.rows,
        *first.offsets,
        *up.offsets,
        *between.biases,
        act,
        GATE=first.type.number,
        UP=up.type.number,
        **between.constants,
        FORM=config.form,
        ROWS=config.rows,
        PAIRS=config.pairs,
        LARGEST=torch.finfo(act.dtype).max,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
