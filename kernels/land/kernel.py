"""The word that copies are through: a launch behind theirs, so that no program must know when others have ended."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hybrimoe_kt.kernels.plan_tables import PlanTables
from hybrimoe_kt.kernels.row_configs import power_of_two

__all__ = ["land", "land_kernel"]


@triton.jit
def land_kernel(copies, landed, num_copies, place, width, LAYERED: tl.constexpr, COPIES: tl.constexpr):
    """One program."""
    columns: tl.constexpr = 4 if LAYERED else 3
    copy = tl.arange(0, COPIES)  # [COPIES]
    there, at = copy < num_copies, copies + copy * columns
    layer = tl.zeros([COPIES], tl.int32) + place
    if LAYERED:
        layer = tl.load(at, mask=there, other=-1)
        at += 1
    there = there & (tl.load(at, mask=there, other=-1) >= 0)
    slot, number = tl.load(at + 1, mask=there, other=0), tl.load(at + 2, mask=there, other=0)
    tl.store(landed + layer.to(tl.int64) * width + slot, number, mask=there)


def land(copies: torch.Tensor, tables: PlanTables, place: int = 0) -> None:
    """Say that `copies`, as of `fetch`, are through; on the stream of that launch, behind it."""
    landed, (number, columns) = tables.parts["landed"], copies.shape
    land_kernel[(1,)](
        copies,
        landed,
        number,
        place,
        landed.shape[1],
        LAYERED=columns == 4,
        COPIES=power_of_two(number),
        num_warps=1,
    )
