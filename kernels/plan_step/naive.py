"""Reference of a step's plan, in Python's integers; it changes the same tensors in place."""

from __future__ import annotations

import torch

from hybrimoe_kt.kernels.plan_tables import (
    ARRIVING,
    BROUGHT,
    FREE,
    HELD,
    LRU,
    ON_CPU,
    LayerRow,
    PlanForm,
    Posted,
    StepOutputs,
)

__all__ = ["naive_plan_step"]


def naive_plan_step(
    row: LayerRow,
    form: PlanForm,
    ids: torch.Tensor,
    weights: torch.Tensor,
    probabilities: torch.Tensor,
    hidden: torch.Tensor,
    out: StepOutputs,
    posts: Posted | None = None,
) -> None:
    """Plan one token's step; arguments as of `plan_step`, all in host memory."""
    chosen, shares = ids.tolist(), _shares(probabilities)
    clock, num_copies = row.counts.tolist()
    expert_of, issued, landed = row.expert_of.tolist(), row.issued.tolist(), row.landed.tolist()
    scores = _touched(row.scores.tolist(), form, chosen, shares, clock + form.top_k)
    given = [int(row.slot_of[expert]) for expert in chosen]
    places = range(form.top_k)
    missing = [k for k in places if given[k] == FREE]
    arriving = [k for k in places if given[k] != FREE and issued[given[k]] > landed[given[k]]]
    held = [k for k in places if k not in missing and k not in arriving]
    index = (len(held) * (form.top_k + 1) + len(arriving)) * (form.top_k + 1) + len(missing)
    transfers, left, given_up = (int(row.table[index]) >> shift & 255 for shift in (0, 8, 16))

    doing, slots, evicted = [ON_CPU] * form.top_k, [FREE] * form.top_k, [FREE] * form.top_k
    for k in sorted(held, key=lambda k: (scores[chosen[k]], -k))[left:]:
        doing[k], slots[k] = HELD, given[k]
    for k in sorted(arriving, key=lambda k: issued[given[k]])[: len(arriving) - given_up]:
        doing[k], slots[k] = ARRIVING, given[k]
    worth = {
        slot: FREE if expert == FREE else scores[expert]
        for slot, expert in enumerate(expert_of)
        if expert not in chosen and issued[slot] <= landed[slot]
    }
    victims = sorted(worth, key=lambda slot: (worth[slot], slot))[:transfers]
    copies = []
    for k, slot in zip(sorted(missing, key=lambda k: (-scores[chosen[k]], k)), victims, strict=False):
        if form.bypass and expert_of[slot] != FREE and scores[chosen[k]] < worth[slot]:
            break
        doing[k], slots[k], evicted[k] = BROUGHT, slot, expert_of[slot]
        copies.append((chosen[k], slot, num_copies + len(copies) + 1))

    row.scores.copy_(torch.tensor(scores, dtype=torch.int32))
    for old in evicted:
        if old != FREE:
            row.slot_of[old] = FREE
    for expert, slot, number in copies:
        row.slot_of[expert], row.expert_of[slot], row.issued[slot] = slot, expert, number
    row.counts.add_(torch.tensor([form.top_k, len(copies)], dtype=torch.int32))
    row.visits[index] += 1
    num_on_cpu = doing.count(ON_CPU)
    row.totals[:2] += torch.tensor([len(copies), num_on_cpu], dtype=torch.int32)
    for k, expert in enumerate(chosen):
        (row.hits if k in held else row.misses)[expert] += 1
    noted = [*chosen, *doing, *slots, *evicted, index, 0]
    row.record[: len(noted)] = torch.tensor(noted, dtype=torch.int32)

    out.resident.fill_(FREE)
    out.late.fill_(FREE)
    out.copies.fill_(-1)
    for expert, what, slot in zip(chosen, doing, slots, strict=True):
        if what != ON_CPU:
            (out.resident if what == HELD else out.late)[expert] = slot
    for number, copy in enumerate(copies):
        out.copies[number] = torch.tensor(copy, dtype=torch.int32)
    out.on_cpu.fill_(int(num_on_cpu > 0))
    if posts is not None:
        _post(posts, doing, ids, weights, hidden)


def _shares(probabilities: torch.Tensor) -> list[int]:
    """Multiples of 2^-24, rounded down; what is no number counts as 0."""
    return (probabilities.nan_to_num(nan=0.0).clamp(0.0, 1.0) * (1 << 24)).int().tolist()


def _touched(scores: list[int], form: PlanForm, ids: list[int], shares: list[int], clock: int) -> list[int]:
    """The scores with what the step teaches."""
    if form.policy == LRU:
        stamps = {expert: clock - place for place, expert in enumerate(ids)}
        return [stamps.get(expert, score) for expert, score in enumerate(scores)]
    cut = sorted(shares, reverse=True)[form.kept - 1]
    return [
        score - (score * form.alpha >> 16) + ((share if share >= cut else 0) * form.alpha >> 10)
        for score, share in zip(scores, shares, strict=True)
    ]


def _post(posts: Posted, doing: list[int], ids: torch.Tensor, weights: torch.Tensor, hidden: torch.Tensor) -> None:
    on_cpu = torch.tensor([what == ON_CPU for what in doing])
    if not on_cpu.any():
        posts.done.fill_(1)
        return
    posts.inbox.copy_(hidden)
    posts.ids.copy_(ids.masked_fill(~on_cpu, -1))
    posts.weights.copy_(weights)
    posts.done.zero_()
    posts.asked.fill_(1)
