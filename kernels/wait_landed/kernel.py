"""Waiting on the device for what was under way when a step was planned, without the host."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hybrimoe_kt.kernels.plan_configs import WaitConfig
from hybrimoe_kt.kernels.plan_tables import LayerRow, PlanForm
from hybrimoe_kt.kernels.row_configs import power_of_two

__all__ = ["wait_landed", "wait_landed_kernel"]


@triton.jit
def wait_landed_kernel(record, issued, landed, timed_out, polls, TOP_K: tl.constexpr, PLACES: tl.constexpr):
    """One program. Each look goes to memory, where another stream writes: AMD's compiler heeds `.cv` alone."""
    place = tl.arange(0, PLACES)  # [PLACES]
    routed = place < TOP_K
    arrives = routed & (tl.load(record + TOP_K + place, mask=routed, other=0) == 1)
    slot = tl.load(record + 2 * TOP_K + place, mask=arrives, other=0)
    wanted = tl.load(issued + slot, mask=arrives, other=0)
    poll, num_missing = 0, 1
    while (num_missing > 0) & (poll < polls):
        number = tl.load(landed + slot, mask=arrives, other=0, cache_modifier=".cv", volatile=True)
        num_missing = tl.sum((arrives & (number < wanted)).to(tl.int32), axis=0)
        poll += 1
    if num_missing > 0:
        tl.store(timed_out, tl.load(timed_out) + 1)


def wait_landed(row: LayerRow, form: PlanForm, timed_out: torch.Tensor, config: WaitConfig) -> None:
    """Return once every expert that arrives, by the row's record, has landed, or after `config.polls` looks.

    In the latter case 1 is added to `timed_out` int32 `[1]`. Behind the layer's `plan_step`.
    """
    wait_landed_kernel[(1,)](
        row.record,
        row.issued,
        row.landed,
        timed_out,
        config.polls,
        TOP_K=form.top_k,
        PLACES=max(8, power_of_two(form.top_k)),
        num_warps=1,
    )
