"""Pairs grouped by expert on the device: a counting sort in one launch, stable, without atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hybrimoe_kt.kernels.configs import SortConfig

__all__ = ["sort_pairs", "sort_pairs_kernel"]


@triton.jit
def sort_pairs_kernel(
    ids,
    slot_of,
    num_pairs,
    num_experts,
    num_blocks,
    pairs,
    slots,
    BLOCK: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Program (expert): counts every expert's pairs to know where its own begin, then writes those."""
    mine = tl.program_id(0)
    slot = tl.load(slot_of + mine)
    if (slot < 0) & (mine > 0):  # the first program also marks the blocks that nobody needs
        return
    expert = tl.arange(0, EXPERTS)  # [EXPERTS]
    present = tl.load(slot_of + expert, mask=expert < num_experts, other=-1) >= 0
    counts = tl.zeros([EXPERTS], tl.int32)
    for first in range(0, num_pairs, CHUNK):
        pair = first + tl.arange(0, CHUNK)
        routed = tl.load(ids + pair, mask=pair < num_pairs, other=-1).to(tl.int32)
        known = (routed >= 0) & (routed < num_experts)
        counts += tl.histogram(tl.where(known, routed, 0), EXPERTS, mask=known)
    blocks = tl.where(present, (counts + BLOCK - 1) // BLOCK, 0)
    if mine == 0:
        total = tl.sum(blocks)
        for first in range(total, num_blocks, CHUNK):
            unused = first + tl.arange(0, CHUNK)
            tl.store(slots + unused, tl.full([CHUNK], -1, tl.int32), mask=unused < num_blocks)
    start = tl.sum(tl.where(expert < mine, blocks, 0))
    num_mine = tl.sum(tl.where(expert == mine, blocks, 0))
    for first in range(0, num_mine, CHUNK):
        block = first + tl.arange(0, CHUNK)
        tl.store(slots + start + block, tl.zeros([CHUNK], tl.int32) + slot, mask=block < num_mine)
    done = start * BLOCK
    if num_mine > 0:
        for first in range(0, num_pairs, CHUNK):
            pair = first + tl.arange(0, CHUNK)
            routed = tl.load(ids + pair, mask=pair < num_pairs, other=-1).to(tl.int32)
            chosen = (routed == mine).to(tl.int32)
            rank = tl.cumsum(chosen, axis=0) - 1
            tl.store(pairs + done + rank, pair, mask=chosen > 0)
            done += tl.sum(chosen)
        rest = done + tl.arange(0, BLOCK)
        tl.store(pairs + rest, tl.full([BLOCK], -1, tl.int32), mask=rest < (start + num_mine) * BLOCK)


def sort_pairs(
    ids: torch.Tensor,
    slot_of: torch.Tensor,
    pairs: torch.Tensor,
    slots: torch.Tensor,
    block_pairs: int,
    config: SortConfig,
) -> None:
    """Write `pairs` int32 `[B * block_pairs]` and `slots` int32 `[B]`; see the naive form.

    `ids` int64 `[T, K]`, `slot_of` int32 `[num_experts]`; B at least `max_blocks`. Pairs of unused blocks are left
    alone.
    """
    num_experts = slot_of.shape[0]
    sort_pairs_kernel[(num_experts,)](
        ids,
        slot_of,
        ids.numel(),
        num_experts,
        slots.shape[0],
        pairs,
        slots,
        BLOCK=block_pairs,
        EXPERTS=max(triton.next_power_of_2(num_experts), 32),
        CHUNK=config.chunk,
        num_warps=config.num_warps,
    )
