"""A state machine over the cache: slots unique, pins never evicted, failed evictions change nothing."""

# Subnormal floats are left out: kt-kernel, once loaded, makes the whole process flush them to zero.
from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hybrimoe_kt.core.cache import FREE, ExpertCache

NUM_EXPERTS, NUM_SLOTS = 9, 4
experts = st.integers(0, NUM_EXPERTS - 1)
slots = st.integers(0, NUM_SLOTS - 1)


class CacheMachine(RuleBasedStateMachine):
    """Drives an `ExpertCache` beside a plain dictionary of what should be where."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = ExpertCache(NUM_EXPERTS, NUM_SLOTS)
        self.model: dict[int, int] = {}  # expert -> slot
        self.loading: dict[int, float] = {}
        self.pins = [0] * NUM_SLOTS
        self.now_s = 0.0

    @rule(expert=experts, delay=st.floats(0.1, 5.0))
    def prepare_into_a_free_slot(self, expert: int, delay: float) -> None:
        free = self.cache.free_slots()
        if free and expert not in self.model:
            assert self.cache.prepare(expert, free[0], self.now_s + delay) == FREE
            self.model[expert] = free[0]
            self.loading[expert] = self.now_s + delay

    @rule(num=st.integers(0, NUM_SLOTS), protected=st.sets(experts))
    def evict(self, num: int, protected: set[int]) -> None:
        before = (list(self.cache.occupant), list(self.cache.slot_of), dict(self.cache.arrival_s))
        allowed = {
            e for e, s in self.model.items() if not self.pins[s] and e not in protected and e not in self.loading
        }
        freed = self.cache.evict(num, protected, sorted)
        if num > len(allowed):
            assert freed is None
            assert before == (self.cache.occupant, self.cache.slot_of, self.cache.arrival_s)
            return
        assert freed is not None
        gone = sorted(allowed)[:num]
        assert sorted(freed) == sorted(self.model[e] for e in gone)
        for expert in gone:
            del self.model[expert]

    @rule(expert=experts)
    def complete(self, expert: int) -> None:
        self.cache.complete(expert)
        self.loading.pop(expert, None)

    @rule(step=st.floats(0.0, 3.0, allow_subnormal=False))
    def settle(self, step: float) -> None:
        self.now_s += step
        self.cache.settle(self.now_s)
        self.loading = {e: at_s for e, at_s in self.loading.items() if at_s > self.now_s}

    @rule(slot=slots)
    def pin(self, slot: int) -> None:
        self.cache.pin(slot)
        self.pins[slot] += 1

    @precondition(lambda self: any(self.pins))
    @rule(slot=slots)
    def unpin(self, slot: int) -> None:
        if self.pins[slot]:
            self.cache.unpin(slot)
            self.pins[slot] -= 1

    @rule(expert=experts)
    def a_transfer_fails(self, expert: int) -> None:
        self.cache.release(expert)
        self.model.pop(expert, None)
        self.loading.pop(expert, None)

    @rule(expert=experts, num=st.integers(1, 3))
    def borrow_and_return(self, expert: int, num: int) -> None:
        """Lent slots work like the others, and leave nothing behind."""
        free = self.cache.free_slots()
        self.cache.lend(num)
        assert self.cache.free_slots() == [*free, *range(NUM_SLOTS, NUM_SLOTS + num)]
        held = expert in self.model
        if not held:
            self.cache.prepare(expert, NUM_SLOTS + num - 1, self.now_s + 1.0)
            assert self.cache.lookup(expert) == "pending"
        self.cache.check_integrity()
        assert self.cache.take_back(num) == ([] if held else [expert])

    @invariant()
    def tables_agree(self) -> None:
        self.cache.check_integrity()
        assert {e: s for e, s in enumerate(self.cache.slot_of) if s != FREE} == self.model
        assert set(self.cache.arrival_s) == set(self.loading)
        held = [e for e in self.cache.occupant if e != FREE]
        assert len(set(held)) == len(held) == len(self.model)
        assert len(self.cache.occupant) == NUM_SLOTS == len(held) + self.cache.occupant.count(FREE)
        for expert in range(NUM_EXPERTS):
            expected = "pending" if expert in self.loading else "hit" if expert in self.model else "miss"
            assert self.cache.lookup(expert) == expected


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
