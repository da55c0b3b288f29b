"""Copies ordered ahead of need by one program: later layers one after the other, then this one."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hybrimoe_kt.kernels.blocks.planning import NOWHERE, least
from hybrimoe_kt.kernels.plan_configs import PlanConfig
from hybrimoe_kt.kernels.plan_tables import PlanTables
from hybrimoe_kt.kernels.row_configs import power_of_two

__all__ = ["look_ahead", "look_ahead_kernel"]


@triton.jit
def look_ahead_kernel(
    ids,
    slot_of,
    expert_of,
    scores,
    issued,
    landed,
    counts,
    totals,
    record,
    tables,
    gains,
    slot_counts,
    class_of,
    copies_out,
    this,
    num_later,
    width,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    PREFETCH: tl.constexpr,
    ADMISSION: tl.constexpr,
    PLACES: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program. After `num_later` layers with a guess comes `this`, whose guess is what the CPU computes in it."""
    side: tl.constexpr = TOP_K + 1
    entries: tl.constexpr = side * side * side
    place = tl.arange(0, PLACES)  # [PLACES]
    slot = tl.arange(0, SLOTS)  # [SLOTS]
    row = tl.arange(0, ROWS)  # [ROWS], of what is ordered
    routed = place < TOP_K
    noted = record + this.to(tl.int64) * (4 * TOP_K + 2 + 4 * PREFETCH)
    own_class = tl.load(class_of + this)
    room = tl.minimum(tl.load(tables + own_class * entries + tl.load(noted + 4 * TOP_K)) >> 24, PREFETCH)
    to_layer = tl.full([ROWS], -1, tl.int32)
    to_slot, of_expert, of_old, of_number = to_layer, to_layer, to_layer, to_layer
    num_copies = 0
    for ahead in range(num_later + ADMISSION):
        is_guess = ahead < num_later
        layer = tl.where(is_guess, this + 1 + ahead, this)
        by_expert, by_slot = layer.to(tl.int64) * NUM_EXPERTS, layer.to(tl.int64) * width
        guessed = tl.load(ids + ahead * TOP_K + place, mask=routed & is_guess, other=-1).to(tl.int32)
        chosen = tl.where(is_guess, guessed, tl.load(noted + place, mask=routed, other=-1))
        given = tl.load(slot_of + by_expert + chosen, mask=routed, other=-1)
        number = tl.load(issued + by_slot + given, mask=given >= 0, other=0)
        arrives = number > tl.load(landed + by_slot + given, mask=given >= 0, other=0)
        worth_here = tl.load(scores + by_expert + chosen, mask=routed, other=0)
        wanted = routed & (given < 0)
        if not is_guess:
            wanted = wanted & (tl.load(noted + TOP_K + place, mask=routed, other=0) == 3)
        # Guesses come the most probable first; what the CPU computes the highest score first, then the lowest number.
        key = tl.where(is_guess, place, -worth_here)
        key = tl.where(wanted, key, NOWHERE)
        before = (key[:, None] < key[None, :]) | ((key[:, None] == key[None, :]) & (chosen[:, None] < chosen[None, :]))
        rank = tl.sum((before & wanted[:, None]).to(tl.int32), axis=0)
        together = tl.where(wanted, 1 << 16, 0) + (routed & (given >= 0) & arrives).to(tl.int32)
        together = tl.sum(together, axis=0)
        num_arriving, num_wanted = together & 0xFFFF, together >> 16
        num_held = TOP_K - num_arriving - num_wanted
        own_gains = gains + tl.load(class_of + layer) * entries

        there = slot < tl.load(slot_counts + layer)
        occupant = tl.load(expert_of + by_slot + slot, mask=there, other=-1)
        ordered = tl.load(issued + by_slot + slot, mask=there, other=0)
        may_go = there & (ordered <= tl.load(landed + by_slot + slot, mask=there, other=0))
        worths = tl.load(scores + by_expert + occupant, mask=occupant >= 0, other=0)
        may_go = may_go & (tl.max((given[:, None] == slot[None, :]).to(tl.int32), axis=0) == 0)
        worth = tl.where(may_go, tl.where(occupant < 0, -1, worths), NOWHERE)
        clock = tl.load(counts + 2 * layer + 1)
        total = totals + 4 * layer + tl.where(is_guess, 2, 3)
        total_before = tl.load(total)
        most = tl.where(is_guess & (ahead == 0), PREFETCH, room) - num_copies
        most = tl.minimum(most, num_wanted)
        tl.debug_barrier()  # this layer has been read: what follows writes it, and the next turn reads another one
        turn, going = 0, 1
        while (turn < most) & (going > 0):
            lowest, found = least(worth, slot)
            mine = wanted & (rank == turn)
            gain = tl.load(own_gains + ((num_held + turn) * side + num_arriving) * side + num_wanted - turn)
            price = tl.sum(tl.where(mine, worth_here, 0), axis=0)
            pays = tl.where(is_guess, gain > 0, price > lowest)
            if pays & (lowest < NOWHERE):
                who = tl.sum(tl.where(mine, chosen, 0), axis=0)
                old = tl.sum(tl.where(slot == found, occupant, 0), axis=0)
                turn += 1
                tl.store(slot_of + by_expert + old, -1, mask=old >= 0)
                tl.store(slot_of + by_expert + who, found)
                tl.store(expert_of + by_slot + found, who)
                tl.store(issued + by_slot + found, clock + turn)
                worth = tl.where(slot == found, NOWHERE, worth)
                is_row = row == num_copies
                to_layer = tl.where(is_row, layer, to_layer)
                to_slot = tl.where(is_row, found, to_slot)
                of_expert = tl.where(is_row, who, of_expert)
                of_old = tl.where(is_row, old, of_old)
                of_number = tl.where(is_row, clock + turn, of_number)
                num_copies += 1
            else:
                going = 0
        tl.store(counts + 2 * layer + 1, clock + turn)
        tl.store(total, total_before + turn)
    tl.store(noted + 4 * TOP_K + 1, num_copies)
    is_row, ahead_of = row < PREFETCH, noted + 4 * TOP_K + 2 + 4 * row
    tl.store(ahead_of, to_layer, mask=is_row)
    tl.store(ahead_of + 1, of_expert, mask=is_row)
    tl.store(ahead_of + 2, to_slot, mask=is_row)
    tl.store(ahead_of + 3, of_old, mask=is_row)
    tl.store(copies_out + 4 * row, to_layer, mask=is_row)
    tl.store(copies_out + 4 * row + 1, of_expert, mask=is_row)
    tl.store(copies_out + 4 * row + 2, to_slot, mask=is_row)
    tl.store(copies_out + 4 * row + 3, of_number, mask=is_row)


def look_ahead(
    tables: PlanTables, place: int, num_later: int, ids: torch.Tensor, copies_out: torch.Tensor, config: PlanConfig
) -> None:
    """Order copies while the step of the layer `place` runs, by the rules of `core.device_rules.look_ahead`.

    `ids` int64 `[num_later, K]` are what the gates of as many next layers would choose, the most probable first.
    `copies_out` int32 `[prefetch_size, 4]` gets each copy's layer, expert, slot and number, -1 beyond the last. Behind
    the layer's `plan_step`; all contiguous, nothing is read on the host.
    """
    form, parts = tables.form, tables.parts
    look_ahead_kernel[(1,)](
        ids,
        parts["slot_of"],
        parts["expert_of"],
        parts["scores"],
        parts["issued"],
        parts["landed"],
        parts["counts"],
        parts["totals"],
        parts["record"],
        tables.tables,
        tables.gains,
        tables.slot_counts,
        tables.class_of,
        copies_out,
        place,
        num_later,
        parts["expert_of"].shape[1],
        NUM_EXPERTS=form.num_experts,
        TOP_K=form.top_k,
        PREFETCH=form.prefetch_size,
        ADMISSION=form.admission,
        PLACES=max(8, power_of_two(form.top_k)),
        SLOTS=max(32, power_of_two(parts["expert_of"].shape[1])),
        ROWS=power_of_two(max(1, form.prefetch_size)),
        num_warps=config.num_warps,
    )
