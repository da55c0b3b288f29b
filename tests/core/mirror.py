"""What a device that follows a coordinator's orders to the letter would have in memory."""

from __future__ import annotations

from collections.abc import Mapping

from hybrimoe_kt.core.types import Orders, Plan, Transfer


class Mirror:
    """Plain tables, `slots[layer, slot]` = expert: every order is carried out at once, and must make sense."""

    def __init__(self, num_slots: Mapping[int, int]) -> None:
        self.num_slots = dict(num_slots)
        """Layer -> its own slots; those from that number on are lent."""
        self.slots: dict[tuple[int, int], int] = {}
        self.num_evictions = 0

    def follow(self, orders: Orders | Plan) -> None:
        """Carry out all orders of one call; those of a plan with its experts computed in between."""
        for transfer in orders.dropped:
            if self.slots.get((transfer.expert.layer, transfer.slot)) == transfer.expert.index:
                self.empty(transfer.expert.layer, transfer.slot)
        for layer in orders.closed:
            for place in [place for place in self.slots if place[0] == layer and place[1] >= self.num_slots[layer]]:
                self.empty(*place)
        if isinstance(orders, Plan):
            self._compute(orders)
        else:
            for transfer in orders.transfers:
                self.copy(transfer)

    def _compute(self, plan: Plan) -> None:
        """A slot's old expert must have been used by the time the transfer into it is made."""
        arriving = {transfer.expert.index: transfer for transfer in plan.transfers}
        assert [transfer.expert.index for transfer in plan.transfers] == [e for e in plan.gpu if e in arriving]
        for expert in plan.gpu:
            if expert in arriving:
                self.copy(arriving[expert])
            assert self.slots.get((plan.layer, plan.slots[expert])) == expert, f"{plan} finds something else in a slot"

    def copy(self, transfer: Transfer) -> None:
        """Bring an expert; what stood there must be what the transfer says it evicts."""
        place = transfer.expert.layer, transfer.slot
        evicted = None if transfer.evicted is None else transfer.evicted.index
        assert self.slots.get(place) == evicted, f"{transfer} evicts what is not there"
        self.num_evictions += evicted is not None
        self.slots[place] = transfer.expert.index

    def empty(self, layer: int, slot: int) -> None:
        """Take out whatever stands there."""
        self.slots.pop((layer, slot), None)

    def slot_of(self, layer: int) -> dict[int, int]:
        """Expert -> slot; no expert may stand in two."""
        held = [(expert, slot) for (owner, slot), expert in self.slots.items() if owner == layer]
        assert len(dict(held)) == len(held), f"layer {layer} holds an expert twice: {held}"
        return dict(held)
