"""Reference of the look ahead, in Python's integers; it changes the same tensors in place."""

from __future__ import annotations

import torch

from hybrimoe_kt.kernels.plan_tables import FREE, ON_CPU, LayerRow, PlanTables

__all__ = ["naive_look_ahead"]


def naive_look_ahead(
    tables: PlanTables, place: int, num_later: int, ids: torch.Tensor, copies_out: torch.Tensor
) -> None:
    """Order copies while the step of the layer `place` runs; arguments as of `look_ahead`, all in host memory."""
    form, this = tables.form, tables.rows[place]
    top_k = form.top_k
    index = int(this.record[4 * top_k])
    room = min(form.prefetch_size, int(this.table[index]) >> 24)
    copies: list[tuple[int, int, int, int, int]] = []
    for ahead in range(num_later):
        row = tables.rows[place + 1 + ahead]
        most = (room if ahead else form.prefetch_size) - len(copies)
        found = _prefetch(row, top_k, ids[ahead].tolist(), most)
        row.totals[2] += len(found)
        copies += [(row.place, *copy) for copy in found]
    if form.admission:
        found = _admit(this, top_k, room - len(copies))
        this.totals[3] += len(found)
        copies += [(place, *copy) for copy in found]
    copies_out.fill_(-1)
    this.record[4 * top_k + 1] = len(copies)
    noted = this.record[4 * top_k + 2 :].view(-1, 4)
    noted.fill_(-1)
    for number, (layer, expert, slot, evicted, copy) in enumerate(copies):
        copies_out[number] = torch.tensor([layer, expert, slot, copy], dtype=torch.int32)
        noted[number] = torch.tensor([layer, expert, slot, evicted], dtype=torch.int32)


def _prefetch(row: LayerRow, top_k: int, ids: list[int], most: int) -> list[tuple[int, int, int, int]]:
    given = [int(row.slot_of[expert]) for expert in ids]
    missing = [expert for expert, slot in zip(ids, given, strict=True) if slot == FREE]
    num_arriving = sum(slot != FREE and int(row.issued[slot]) > int(row.landed[slot]) for slot in given)
    num_held, side, found = top_k - len(missing) - num_arriving, top_k + 1, []
    for number, (expert, (slot, _)) in enumerate(zip(missing, _victims(row, ids), strict=False)):
        index = ((num_held + number) * side + num_arriving) * side + len(missing) - number
        if number >= most or int(row.gains[index]) <= 0:
            break
        found.append(_order(row, expert, slot))
    return found


def _admit(row: LayerRow, top_k: int, most: int) -> list[tuple[int, int, int, int]]:
    ids, doing = row.record[:top_k].tolist(), row.record[top_k : 2 * top_k].tolist()
    absent = [e for e, what in zip(ids, doing, strict=True) if what == ON_CPU and int(row.slot_of[e]) == FREE]
    absent.sort(key=lambda expert: (-int(row.scores[expert]), expert))
    found = []
    for number, (expert, (slot, worth)) in enumerate(zip(absent, _victims(row, ids), strict=False)):
        if number >= most or int(row.scores[expert]) <= worth:
            break
        found.append(_order(row, expert, slot))
    return found


def _victims(row: LayerRow, ids: list[int]) -> list[tuple[int, int]]:
    """Slots that may be given away and what each costs, -1 for a free one, the first to go first."""
    worth = [
        (slot, FREE if expert == FREE else int(row.scores[expert]))
        for slot, expert in enumerate(row.expert_of.tolist())
        if expert not in ids and int(row.issued[slot]) <= int(row.landed[slot])
    ]
    return sorted(worth, key=lambda pair: (pair[1], pair[0]))


def _order(row: LayerRow, expert: int, slot: int) -> tuple[int, int, int, int]:
    """Give `slot` to `expert`: expert, slot, who was there, number of the copy."""
    old = int(row.expert_of[slot])
    if old != FREE:
        row.slot_of[old] = FREE
    row.counts[1] += 1
    number = int(row.counts[1])
    row.slot_of[expert], row.expert_of[slot], row.issued[slot] = slot, expert, number
    return expert, slot, old, number
