"""A state machine over the coordinator, evicting as it does when it serves: by transfers over occupied slots.

Whatever is called in whatever order: a slot holds one expert, one that a plan computes with is never evicted, pins are
those of the open plan, a failed transfer leaves nothing half there, no slot is lost, and what leaves a slot is what
was ordered to.
"""

# Subnormal floats are left out: kt-kernel, once loaded, makes the whole process flush them to zero.
from __future__ import annotations

import random
from collections import Counter
from typing import ClassVar

from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from hybrimoe_kt.core.cache import FREE, ExpertCache
from hybrimoe_kt.core.coordinator import Coordinator
from hybrimoe_kt.core.cost import CostModel
from hybrimoe_kt.core.policies import POLICIES
from hybrimoe_kt.core.prefetch.predictors import PREDICTORS
from hybrimoe_kt.core.schedule import SCHEDULERS
from hybrimoe_kt.core.strategy import Strategy
from hybrimoe_kt.core.types import LayerSpec, Orders, Plan, Routing, Transfer
from tests.core.mirror import Mirror

LAYERS, EXPERTS, TOP_K = 3, 8, 3
COST = CostModel(
    cpu=lambda load: 1e-3 * load, gpu=lambda load: 1e-4, link_bytes_per_s=1e9, expert_bytes=10**6, dense_s=4e-3
)
"""A millisecond on the link, one for each token on the CPU, a tenth on the GPU: transfers pay."""
layers = st.integers(0, LAYERS - 1)
routed = st.dictionaries(st.integers(0, EXPERTS - 1), st.integers(1, 9), min_size=1, max_size=EXPERTS)
one_token = st.sets(st.integers(0, EXPERTS - 1), min_size=TOP_K, max_size=TOP_K)


def routing_of(layer: int, loads: dict[int, int] | set[int]) -> Routing:
    """A prompt's loads, or one token's experts."""
    is_token = isinstance(loads, set)
    by_expert = dict.fromkeys(sorted(loads), 1) if isinstance(loads, set) else loads
    scores = [by_expert.get(expert, 0) / sum(by_expert.values()) for expert in range(EXPERTS)]
    return Routing(layer, by_expert, 1 if is_token else 9, scores, {e: float(load) for e, load in by_expert.items()})


routings = st.builds(routing_of, layers, st.one_of(one_token, one_token, routed))


class CoordinatorMachine(RuleBasedStateMachine):
    """Drives a `Coordinator` as hosts do, beside a device that follows its orders."""

    evictions: ClassVar[list[int]] = []
    """Of each example."""

    @initialize(
        scheduler=st.sampled_from(sorted(set(SCHEDULERS) - {"cpu_only"})),
        policy=st.sampled_from(sorted(set(POLICIES) - {"belady"})),
        predictor=st.sampled_from(sorted(PREDICTORS)),
        num_slots=st.sampled_from([2, 1, 3, 4, EXPERTS]),
        num_buffer_slots=st.sampled_from([0, 0, 2, EXPERTS]),
        prefetch_size=st.sampled_from([2, 4, 1, 0]),
        prefetch_depth=st.integers(1, 2),
        admission=st.sampled_from([True, None]),
        filled=st.booleans(),
        seed=st.integers(0, 999),
    )
    def start(
        self,
        scheduler: str,
        policy: str,
        predictor: str,
        num_slots: int,
        num_buffer_slots: int,
        prefetch_size: int,
        prefetch_depth: int,
        admission: bool | None,
        filled: bool,
        seed: int,
    ) -> None:
        specs = [
            LayerSpec(layer, EXPERTS, TOP_K, 10**6, num_slots, num_buffer_slots=num_buffer_slots)
            for layer in range(LAYERS)
        ]
        strategy = Strategy(
            scheduler=scheduler, policy=policy, predictor=predictor,
            prefetch_size=prefetch_size, prefetch_depth=prefetch_depth, admission=admission,
        )  # fmt: skip
        self.coordinator = Coordinator(specs, COST, strategy)
        self.mirror = Mirror(dict.fromkeys(range(LAYERS), num_slots))
        self.guesses_count = predictor in ("stale_gate", "perfect")
        self.open: Plan | None = None
        self.has_prefetched = False
        self.ordered: list[Transfer] = []
        """The last of them."""
        if filled:
            self.mirror.follow(Orders(transfers=self.coordinator.initial_transfers()))
        self.serve(seed)

    def cache(self, layer: int) -> ExpertCache:
        return self.coordinator._layers[layer].cache

    @precondition(lambda self: self.open is None)
    @rule(routing=routings)
    def plan(self, routing: Routing) -> None:
        self.open, self.has_prefetched = self.coordinator.plan(routing), False
        self.ordered = [*self.ordered[-20:], *self.open.transfers]
        assert sorted([*self.open.cpu, *self.open.gpu]) == sorted(routing.loads)
        assert self.open.slots.keys() == set(self.open.gpu)
        self.mirror.follow(self.open)
        self.caches_agree_with_the_mirror()

    @precondition(lambda self: self.open is not None and not self.has_prefetched)
    @rule(chosen=st.lists(st.one_of(one_token, routed), min_size=0, max_size=2))
    def prefetch(self, chosen: list[dict[int, int] | set[int]]) -> None:
        assert self.open is not None
        layer, used = self.open.layer, set(self.open.slots.values())
        guesses = [routing_of((layer + ahead) % LAYERS, loads) for ahead, loads in enumerate(chosen, start=1)]
        orders = self.coordinator.prefetch(self.open, guesses)
        assert all(transfer.kind == "prefetch" for transfer in orders.transfers)
        for transfer in orders.transfers:
            assert transfer.expert.layer != layer or transfer.slot not in used, f"{transfer} overwrites what is in use"
            if self.guesses_count and transfer.evicted is not None and transfer.expert.layer != layer:
                wanted = next(guess.loads for guess in guesses if guess.layer == transfer.expert.layer)
                assert transfer.evicted.index not in wanted, f"{transfer} evicts what it is brought beside"
        self.has_prefetched = True
        self.ordered += orders.transfers
        self.mirror.follow(orders)
        self.caches_agree_with_the_mirror()

    @precondition(lambda self: self.open is not None)
    @rule()
    def finish(self) -> None:
        assert self.open is not None
        self.mirror.follow(self.coordinator.finish(self.open))
        assert self.cache(self.open.layer).num_slots == self.mirror.num_slots[self.open.layer], "slots are still lent"
        self.open = None
        self.caches_agree_with_the_mirror()

    @rule(routing=routings, ahead=st.lists(st.one_of(one_token, routed), max_size=2))
    def step(self, routing: Routing, ahead: list[dict[int, int] | set[int]]) -> None:
        """A whole one, as most are."""
        if self.open is not None:
            self.finish()
        self.plan(routing)
        self.prefetch(ahead)
        self.finish()

    @rule(seed=st.integers(0, 999))
    def serve(self, seed: int) -> None:
        """Some tokens through all layers, now and then a prompt, with guesses that are right half of the time."""
        draw = random.Random(seed)

        def loads() -> dict[int, int] | set[int]:
            token = set(draw.sample(range(EXPERTS), TOP_K))
            return token if draw.random() < 0.8 else dict.fromkeys(draw.sample(range(EXPERTS), EXPERTS), 3)

        routed = [loads() for _ in range(4 * LAYERS)]
        for number, now in enumerate(routed):
            later = routed[number + 1 : number + 3]
            self.step(routing_of(number % LAYERS, now), [right if draw.random() < 0.5 else loads() for right in later])

    @precondition(lambda self: self.ordered)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        """Some transfer did not happen; its expert may have lost the slot since, or come back into another."""
        transfer = data.draw(st.sampled_from(self.ordered))
        self.ordered.remove(transfer)
        self.coordinator.fail(transfer)
        if self.mirror.slots.get((transfer.expert.layer, transfer.slot)) == transfer.expert.index:
            self.mirror.empty(transfer.expert.layer, transfer.slot)

    @precondition(lambda self: self.open is None)
    @rule(layer=layers, slot=st.integers(0, EXPERTS - 1))
    def drop(self, layer: int, slot: int) -> None:
        self.coordinator.drop(layer, slot)
        self.mirror.empty(layer, slot)

    @precondition(lambda self: self.open is None)
    @rule(layer=layers, num_slots=st.sampled_from([0, 1, 2, 3, EXPERTS]))
    def resize(self, layer: int, num_slots: int) -> None:
        self.coordinator.resize(layer, num_slots)
        for slot in range(2 * EXPERTS):
            self.mirror.empty(layer, slot)
        self.mirror.num_slots[layer] = num_slots

    @precondition(lambda self: self.open is None)
    @rule(layer=layers, num_tokens=st.sampled_from([1, 9]))
    def pass_over(self, layer: int, num_tokens: int) -> None:
        if self.coordinator.decides_nothing(layer, num_tokens):
            began_s = self.coordinator.now_s
            assert dict(enumerate(self.coordinator.pass_over(layer, num_tokens))) == self.mirror.slot_of(layer)
            assert len(self.mirror.slot_of(layer)) == EXPERTS and self.coordinator.now_s > began_s

    @precondition(lambda self: self.open is None)
    @rule(scheduler=st.sampled_from([None, "cpu_only", "gpu_only"]))
    def use(self, scheduler: str | None) -> None:
        self.coordinator.use(scheduler)

    @invariant()
    def caches_agree_with_the_mirror(self) -> None:
        if not hasattr(self, "coordinator"):  # not started yet
            return
        self.coordinator.check_integrity()
        for layer in range(LAYERS):
            cache = self.cache(layer)
            held = self.mirror.slot_of(layer)
            assert {e: slot for e, slot in enumerate(cache.slot_of) if slot != FREE} == held
            assert {e: slot for slot, e in enumerate(cache.occupant) if e != FREE} == held
            assert cache.arrival_s.keys() <= held.keys(), "something half there"
            is_open = self.open is not None and self.open.layer == layer
            used = Counter(set(self.open.slots.values())) if is_open and self.open is not None else Counter()
            assert cache.pins == [used[slot] for slot in range(cache.num_slots)]
            own = self.mirror.num_slots[layer]
            assert (
                len(cache.occupant)
                == cache.num_slots
                in (own, own + self.coordinator._layers[layer].spec.num_buffer_slots)
            )
            assert len(cache.free_slots()) + len({*held.values()} | used.keys()) == cache.num_slots

    def teardown(self) -> None:
        if not hasattr(self, "coordinator"):
            return
        if self.open is not None:
            self.finish()
        self.evictions.append(self.mirror.num_evictions)
        event(f"{min(self.mirror.num_evictions, 50) // 10 * 10} evictions or more")


def test_any_order_of_calls_keeps_the_caches_right() -> None:
    """And many orders evict: a machine whose caches never overflow would prove nothing."""
    CoordinatorMachine.evictions.clear()
    run_state_machine_as_test(
        CoordinatorMachine, settings=settings(max_examples=60, stateful_step_count=30, deadline=None)
    )
    counts = CoordinatorMachine.evictions
    assert sum(count >= 5 for count in counts) >= len(counts) / 6, f"evictions by example: {counts}"
