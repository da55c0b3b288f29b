"""One layer's slots: which expert stands where, which are arriving, which may not be evicted now."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import compress
from operator import not_

FREE = -1
"""In both tables: no slot, no expert."""


class ExpertCache:
    """Slot table of one layer: FREE -> LOADING -> READY, with pins counted per slot.

    Residency is logical: what will be true once the transfers ordered so far have run. `slot_of[expert]` and
    `occupant[slot]` are inverse to each other (-1 = none); `arrival_s` holds the LOADING experts with the
    virtual time at which each lands. Read them freely, change them only through the methods.
    """

    __slots__ = ("arrival_s", "num_experts", "num_pins", "num_slots", "occupant", "pins", "slot_of")

    def __init__(self, num_experts: int, num_slots: int) -> None:
        self.num_experts = num_experts
        self.num_slots = min(num_slots, num_experts)
        self.slot_of = [FREE] * num_experts
        self.occupant = [FREE] * self.num_slots
        self.pins = [0] * self.num_slots
        self.num_pins = 0
        self.arrival_s: dict[int, float] = {}

    def settle(self, now_s: float) -> None:
        """Turn every LOADING expert whose arrival is not later than `now_s` READY."""
        arrival_s = self.arrival_s
        for expert in [e for e, at_s in arrival_s.items() if at_s <= now_s]:
            del arrival_s[expert]

    def prepare(self, expert: int, slot: int, arrival_s: float) -> int:
        """Give `slot` to `expert`, which lands at `arrival_s`; return the expert evicted, -1 if the slot was free.

        The caller has made sure that nothing needs the old occupant after the transfer starts.
        """
        assert self.slot_of[expert] == FREE, f"expert {expert} is already in slot {self.slot_of[expert]}"
        old = self.occupant[slot]
        if old != FREE:
            self.slot_of[old] = FREE
            self.arrival_s.pop(old, None)
        self.slot_of[expert] = slot
        self.occupant[slot] = expert
        self.arrival_s[expert] = arrival_s
        return old

    def complete(self, expert: int) -> None:
        """Turn a LOADING expert READY; no effect if it has left or is READY already."""
        self.arrival_s.pop(expert, None)

    def reschedule(self, expert: int, arrival_s: float) -> None:
        """Let a LOADING expert land at another time; no effect on any other."""
        if expert in self.arrival_s:
            self.arrival_s[expert] = arrival_s

    def pin(self, slots: Iterable[int]) -> None:
        """Forbid eviction from these slots until the matching `unpin`."""
        pins, num = self.pins, 0
        for slot in slots:
            pins[slot] += 1
            num += 1
        self.num_pins += num

    def unpin(self, slots: Iterable[int]) -> None:
        """Undo one pin of each of these slots."""
        pins, num = self.pins, 0
        for slot in slots:
            assert pins[slot] > 0, f"slot {slot} is not pinned; was its plan finished before?"
            pins[slot] -= 1
            num += 1
        self.num_pins -= num

    def release(self, expert: int) -> None:
        """Free the slot of `expert` whatever its state; no effect if it holds none."""
        slot = self.slot_of[expert]
        if slot != FREE:
            self.slot_of[expert] = FREE
            self.occupant[slot] = FREE
            self.arrival_s.pop(expert, None)

    def lend(self, num: int) -> None:
        """Add `num` free slots, numbered from `num_slots` on, until `take_back`."""
        self.num_slots += num
        self.occupant += [FREE] * num
        self.pins += [0] * num

    def take_back(self, num: int) -> list[int]:
        """Remove the last `num` slots; return the experts that stood there and are gone."""
        first = self.num_slots - num
        assert not any(self.pins[first:]), "a lent slot is pinned"
        gone = [expert for expert in self.occupant[first:] if expert != FREE]
        for expert in gone:
            self.release(expert)
        del self.occupant[first:], self.pins[first:]
        self.num_slots = first
        return gone

    def evictable(self, protected: Collection[int]) -> list[int]:
        """Return the READY, unpinned experts outside `protected`, in slot order."""
        occupant, arrival_s = self.occupant, self.arrival_s
        found = list(compress(occupant, map(not_, self.pins))) if self.num_pins else occupant.copy()
        if FREE in found:
            found = [e for e in found if e != FREE]
        if arrival_s:
            found = [e for e in found if e not in arrival_s]
        return [e for e in found if e not in protected] if protected else found

    def free_slots(self) -> list[int]:
        """Return the slots that hold nothing and are not pinned, lowest first."""
        pins = self.pins
        return [slot for slot, e in enumerate(self.occupant) if e == FREE and not pins[slot]]

    def num_pinned(self, outside: Collection[int]) -> int:
        """Return how many pinned slots hold none of the experts in `outside` and nothing that is LOADING."""
        pinned = compress(self.occupant, self.pins)
        return sum([e not in outside and e not in self.arrival_s for e in pinned])

    def check_integrity(self) -> None:
        """Assert that the two tables are inverse, that every arriving expert has a slot and that pins are sane."""
        for slot, expert in enumerate(self.occupant):
            assert expert == FREE or self.slot_of[expert] == slot, f"slot {slot} and expert {expert} disagree"
        held = [slot for slot in self.slot_of if slot != FREE]
        assert len(held) == len(set(held)), "one slot holds two experts"
        assert len(held) == sum(e != FREE for e in self.occupant), "an expert names a slot that does not hold it"
        assert all(self.slot_of[e] != FREE for e in self.arrival_s), "an arriving expert has no slot"
        assert all(count >= 0 for count in self.pins), "a pin count is negative"
        assert sum(self.pins) == self.num_pins, "pins were counted wrongly"
