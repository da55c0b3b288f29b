"""A layer's step planned in one launch of one program: what it decides stays in registers until all is known."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hybrimoe_kt.kernels.blocks.planning import NOWHERE, cut_of, faded, least, shares_of
from hybrimoe_kt.kernels.plan_configs import PlanConfig
from hybrimoe_kt.kernels.plan_tables import LRU, LayerRow, PlanForm, Posted, StepOutputs
from hybrimoe_kt.kernels.row_configs import power_of_two

__all__ = ["plan_step", "plan_step_kernel"]


@triton.jit
def plan_step_kernel(
    ids,
    weights,
    probabilities,
    hidden,
    slot_of,
    expert_of,
    scores,
    issued,
    landed,
    counts,
    table,
    visits,
    totals,
    hits,
    misses,
    record,
    resident,
    late,
    copies,
    on_cpu,
    inbox,
    posted_ids,
    posted_weights,
    asked,
    done,
    num_slots,
    LRU: tl.constexpr,
    ALPHA: tl.constexpr,
    KEPT: tl.constexpr,
    BYPASS: tl.constexpr,
    POSTS: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    PLACES: tl.constexpr,
    SLOTS: tl.constexpr,
    NUM_WORDS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """One program. Kinds of routed experts: 0 held, 1 arriving, 2 missing; what is done with them: 3 the CPU's."""
    place = tl.arange(0, PLACES)  # [PLACES]
    expert = tl.arange(0, EXPERTS)  # [EXPERTS]
    slot = tl.arange(0, SLOTS)  # [SLOTS]
    routed, present, there = place < TOP_K, expert < NUM_EXPERTS, slot < num_slots
    # What is known beforehand comes in one wave; from here to there it is passed on between threads.
    occupant = tl.load(expert_of + slot, mask=there, other=-1)
    chosen = tl.load(ids + place, mask=routed, other=0).to(tl.int32)
    score = tl.load(scores + expert, mask=present, other=0)
    slot_by_expert = tl.load(slot_of + expert, mask=present, other=-1)
    ordered = tl.load(issued + slot, mask=there, other=0)
    through = tl.load(landed + slot, mask=there, other=0)  # once: copies land meanwhile
    clock, num_copies = tl.load(counts), tl.load(counts + 1)
    num_brought_before, num_on_cpu_before = tl.load(totals), tl.load(totals + 1)
    if POSTS:
        weight = tl.load(weights + place, mask=routed, other=0.0)
    if not LRU:
        share = tl.load(probabilities + expert, mask=present, other=0.0)

    given = tl.where(routed, tl.gather(slot_by_expert, chosen, axis=0), -1)
    number = tl.gather(ordered, tl.maximum(given, 0), axis=0)
    arrives = number > tl.gather(through, tl.maximum(given, 0), axis=0)
    kind = tl.where(given >= 0, arrives.to(tl.int32), 2)
    together = tl.sum(tl.where(routed, 1 << (8 * kind), 0), axis=0)
    num_arriving, num_missing = (together >> 8) & 255, together >> 16
    index = ((together & 255) * (TOP_K + 1) + num_arriving) * (TOP_K + 1) + num_missing
    entry = tl.load(table + index)
    num_visits = tl.load(visits + index)
    num_hits = tl.load(hits + chosen, mask=routed, other=0)
    num_misses = tl.load(misses + chosen, mask=routed, other=0)

    # By expert: its place in the router's list, counted from 1.
    listed = tl.zeros([EXPERTS], tl.int32)
    for turn in tl.static_range(TOP_K):
        listed = tl.where(expert == tl.load(ids + turn).to(tl.int32), turn + 1, listed)
    if LRU:
        score = tl.where(listed > 0, clock + TOP_K + 1 - listed, score)
    else:
        share = shares_of(share)
        cut = cut_of(tl.where(present, share, -1), KEPT, EXPERTS)
        score = faded(score, tl.where(share >= cut, share, 0), ALPHA)
    chosen_score = tl.gather(score, chosen, axis=0)

    # The place of each among its kind: held the least first, arriving the first to land, missing the highest first.
    kind = tl.where(routed, kind, 3)
    key = tl.where(kind == 1, number, tl.where(kind == 0, chosen_score, -chosen_score))
    tie = tl.where(kind == 0, -place, place)
    before = (key[:, None] < key[None, :]) | ((key[:, None] == key[None, :]) & (tie[:, None] < tie[None, :]))
    rank = tl.sum((before & (kind[:, None] == kind[None, :])).to(tl.int32), axis=0)

    worth = tl.gather(tl.where(listed > 0, NOWHERE, score), tl.maximum(occupant, 0), axis=0)
    worth = tl.where(there & (ordered <= through), tl.where(occupant < 0, -1, worth), NOWHERE)
    target = tl.full([PLACES], -1, tl.int32)
    going, num_brought = 1, 0
    for turn in range(tl.minimum(entry & 255, num_missing)):
        lowest, found = least(worth, slot)
        mine = (kind == 2) & (rank == turn)
        going = going * (lowest < NOWHERE).to(tl.int32)
        if BYPASS:
            going = going * (tl.sum(tl.where(mine, chosen_score, 0), axis=0) >= lowest).to(tl.int32)
        target = tl.where(mine & (going > 0), found, target)
        worth = tl.where(slot == found, NOWHERE, worth)
        num_brought += going
    is_brought = target >= 0
    evicted = tl.where(is_brought, tl.gather(occupant, tl.maximum(target, 0), axis=0), -1)

    stays = tl.where(kind == 0, rank >= ((entry >> 8) & 255), rank < num_arriving - ((entry >> 16) & 255))
    stays = tl.where(kind < 2, stays.to(tl.int32), is_brought.to(tl.int32)) > 0
    doing = tl.where(stays, kind, 3)
    used = tl.where(stays, tl.where(kind == 2, target, given), -1)
    cpus = routed & (stays == 0)
    num_on_cpu = tl.sum(cpus.to(tl.int32), axis=0)
    # By expert: slot + 1, with a bit for those that are late.
    said = tl.where(stays, used + 1 + (tl.minimum(kind, 1) << 16), 0)
    said = tl.where(listed > 0, tl.gather(said, tl.maximum(listed - 1, 0), axis=0), 0)

    tl.debug_barrier()  # the state has been read: from here on it is written, and nothing of it is read again
    tl.store(scores + expert, score, mask=present)
    tl.store(slot_of + evicted, -1, mask=evicted >= 0)  # nobody routed is evicted
    tl.store(slot_of + chosen, target, mask=is_brought)
    tl.store(expert_of + target, chosen, mask=is_brought)
    tl.store(issued + target, num_copies + 1 + rank, mask=is_brought)
    tl.store(counts, clock + TOP_K)
    tl.store(counts + 1, num_copies + num_brought)
    tl.store(visits + index, num_visits + 1)
    tl.store(totals, num_brought_before + num_brought)
    tl.store(totals + 1, num_on_cpu_before + num_on_cpu)
    tl.store(hits + chosen, num_hits + 1, mask=kind == 0)
    tl.store(misses + chosen, num_misses + 1, mask=routed & (kind > 0))
    tl.store(record + place, chosen, mask=routed)
    tl.store(record + TOP_K + place, doing, mask=routed)
    tl.store(record + 2 * TOP_K + place, used, mask=routed)
    tl.store(record + 3 * TOP_K + place, evicted, mask=routed)
    tl.store(record + 4 * TOP_K, index)
    tl.store(record + 4 * TOP_K + 1, 0)
    is_late = said >= (1 << 16)
    tl.store(resident + expert, tl.where(is_late, -1, said - 1), mask=present)
    tl.store(late + expert, tl.where(is_late, (said & 0xFFFF) - 1, -1), mask=present)
    unused = routed & (place >= num_brought)  # rows of copies: those brought write theirs, by rank
    for column in tl.static_range(3):
        tl.store(copies + 3 * place + column, -1, mask=unused)
    tl.store(copies + 3 * rank, chosen, mask=is_brought)
    tl.store(copies + 3 * rank + 1, target, mask=is_brought)
    tl.store(copies + 3 * rank + 2, num_copies + 1 + rank, mask=is_brought)
    tl.store(on_cpu, (num_on_cpu > 0).to(tl.int32))

    if POSTS:
        if num_on_cpu > 0:
            for first in range(0, NUM_WORDS, WORDS):
                word = first + tl.arange(0, WORDS)
                states = tl.load(hidden + word, mask=word < NUM_WORDS, other=0)
                tl.store(inbox + word, states, mask=word < NUM_WORDS)
            tl.store(posted_ids + place, tl.where(cpus, chosen, -1).to(tl.int64), mask=routed)
            tl.store(posted_weights + place, weight, mask=routed)
            tl.store(done, 0)
            tl.debug_barrier()  # all threads' stores, then one thread's that the host looks for
            tl.atomic_xchg(asked, 1, sem="release", scope="sys")
        else:
            tl.store(done, 1)


def plan_step(
    row: LayerRow,
    form: PlanForm,
    ids: torch.Tensor,
    weights: torch.Tensor,
    probabilities: torch.Tensor,
    hidden: torch.Tensor,
    out: StepOutputs,
    posts: Posted | None,
    config: PlanConfig,
) -> None:
    """Plan one token's step of the layer `row` by the rules of `core.device_rules.plan_step`, and change the row.

    `ids` int64 `[K]`, all different, and `weights` float32 `[K]` are the router's choice, `probabilities` float32 `[E]`
    the softmax behind it; `hidden [H]` any float. With `posts` the CPU is asked for its part. All contiguous; nothing
    is read on the host.
    """
    word = torch.int32 if hidden.numel() * hidden.element_size() % 4 == 0 else torch.int16
    states = hidden.view(word)
    nothing = out.on_cpu  # never written to in its place
    plan_step_kernel[(1,)](
        ids,
        weights,
        probabilities,
        states,
        row.slot_of,
        row.expert_of,
        row.scores,
        row.issued,
        row.landed,
        row.counts,
        row.table,
        row.visits,
        row.totals,
        row.hits,
        row.misses,
        row.record,
        out.resident,
        out.late,
        out.copies,
        out.on_cpu,
        states if posts is None else posts.inbox.view(word),
        ids if posts is None else posts.ids,
        weights if posts is None else posts.weights,
        nothing if posts is None else posts.asked,
        nothing if posts is None else posts.done,
        row.num_slots,
        LRU=form.policy == LRU,
        ALPHA=form.alpha,
        KEPT=form.kept,
        BYPASS=form.bypass,
        POSTS=posts is not None,
        NUM_EXPERTS=form.num_experts,
        TOP_K=form.top_k,
        EXPERTS=max(32, power_of_two(form.num_experts)),
        PLACES=max(8, power_of_two(form.top_k)),
        SLOTS=max(32, power_of_two(row.num_slots)),
        NUM_WORDS=states.numel(),
        WORDS=config.words,
        num_warps=config.num_warps,
    )
