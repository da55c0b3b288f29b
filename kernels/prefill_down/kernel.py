"""Prefill, second half: the down projection of a block of one expert's pairs on tensor cores."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hybrimoe_kt.kernels.between import PLAIN, Between
from hybrimoe_kt.kernels.configs import PrefillConfig
from hybrimoe_kt.kernels.quants.dispatch import step_columns, step_tiles
from hybrimoe_kt.kernels.workspace import MatrixInSlot

__all__ = ["prefill_down", "prefill_down_kernel"]


@triton.jit
def prefill_down_kernel(
    memory,
    slot_bytes,
    tables,
    pairs,
    slots,
    act,
    inter,
    hidden,
    o0,
    o1,
    o2,
    o3,
    down_bias,
    answers,
    DOWN: tl.constexpr,
    BIASED: tl.constexpr,
    FORM: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Program (block of pairs, row block)."""
    slot = tl.load(slots + tl.program_id(0))
    if slot < 0:
        return
    mem = memory + slot.to(tl.int64) * slot_bytes
    pair = tl.load(pairs + tl.program_id(0) * PAIRS + tl.arange(0, PAIRS))  # [PAIRS]
    place = tl.maximum(pair, 0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    rows = tl.minimum(row, hidden - 1)
    width = inter // 8 * 8
    act_row = tl.multiple_of(act, 16) + (place * width)[None, :]  # [1, PAIRS]
    total = tl.zeros([ROWS, PAIRS], tl.float32)
    for step in range(0, tl.cdiv(inter, 64)):
        low, high = step_columns(DOWN, step)
        x_low = tl.load(act_row + low[:, None], mask=low[:, None] < width, other=0.0)  # [32, PAIRS]
        x_high = tl.load(act_row + high[:, None], mask=high[:, None] < width, other=0.0)
        w_low, w_high = step_tiles(DOWN, FORM, mem, tables, o0, o1, o2, o3, rows, step, inter)
        total = tl.dot(w_low.to(x_low.dtype), x_low, total)
        total = tl.dot(w_high.to(x_low.dtype), x_high, total)
    if BIASED:
        total += tl.load((mem + down_bias).to(tl.pointer_type(tl.float32)) + rows)[:, None]
    features = hidden // 8 * 8
    at = (place * features)[:, None] + row[None, :]  # [PAIRS, ROWS]
    tl.store(answers + at, tl.trans(total), mask=(pair >= 0)[:, None] & (row < features)[None, :])


def prefill_down(
    memory: torch.Tensor,
    tables: torch.Tensor,
    down: MatrixInSlot,
    pairs: torch.Tensor,
    slots: torch.Tensor,
    act: torch.Tensor,
    answers: torch.Tensor,
    config: PrefillConfig,
    between: Between = PLAIN,
) -> None:
    """Write `down act` and the bias, if any, to the rows of `answers` float32 `[T * K, H]` that `pairs` names.

    `pairs`, `slots` and `act [T * K, inter]` as prefill_gate_up had and wrote them.
    """
    grid = (slots.shape[0], triton.cdiv(down.rows, config.rows))
    prefill_down_kernel[grid](
        memory,
        memory.shape[1],
        tables,
        pairs,
        slots,
        act,
        down.columns,
        down.rows,
        *down.offsets,
        between.down_bias,
        answers,
        DOWN=down.type.number,
        BIASED=between.form.has_biases,
        FORM=config.form,
        ROWS=config.rows,
        PAIRS=config.pairs,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
