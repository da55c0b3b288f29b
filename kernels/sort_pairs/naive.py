"""Reference of the pair sorting."""

from __future__ import annotations

import torch

__all__ = ["naive_sort_pairs"]


def naive_sort_pairs(
    ids: torch.Tensor, slot_of: torch.Tensor, block_pairs: int, num_blocks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (pairs int32 `[num_blocks * block_pairs]`, slots int32 `[num_blocks]`).

    Pairs (positions in `ids [T, K]`) of experts with a slot, by expert and then position; every expert begins a new
    block of `block_pairs`, its last one filled up with -1. A block's slot is its expert's, -1 for blocks not needed.
    """
    pairs = torch.full((num_blocks, block_pairs), -1, dtype=torch.int32)
    slots = torch.full((num_blocks,), -1, dtype=torch.int32)
    block = 0
    for expert, slot in enumerate(slot_of.tolist()):
        mine = torch.where(ids.flatten() == expert)[0].to(torch.int32)
        for part in mine.split(block_pairs) if slot >= 0 and mine.numel() else ():
            pairs[block, : part.numel()], slots[block] = part, slot
            block += 1
    return pairs.flatten(), slots
