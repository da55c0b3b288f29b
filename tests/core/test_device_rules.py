"""The rules of a device: slots stay unique, nothing in use leaves, and the host's own decisions come out."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrimoe_kt.core.coordinator import Coordinator
from hybrimoe_kt.core.decision_table import DecisionTable
from hybrimoe_kt.core.device_coordinator import DeviceCoordinator, as_plan, rules_of
from hybrimoe_kt.core.device_rules import (
    ARRIVING,
    BROUGHT,
    HELD,
    ON_CPU,
    SCORE_BITS,
    SHARE_BITS,
    Copy,
    DeviceRules,
    Guess,
    LayerTables,
    Step,
    look_ahead,
    plan_step,
    shares_of,
)
from hybrimoe_kt.core.policies import make_policies
from hybrimoe_kt.core.schedule import make_scheduler
from hybrimoe_kt.core.strategy import Strategy
from hybrimoe_kt.core.types import LayerSpec, Routing
from hybrimoe_kt.errors import ConfigError
from tests.core.instances import cost_of

SCHEDULERS = ("balanced", "paper", "gpu_only", "one_ratio", "fiddler", "cpu_only")
COST = cost_of("rtx4090-cpu16", "qwen3-30b-a3b")
TABLES = {
    (name, top_k): DecisionTable(make_scheduler(name, {}), COST, top_k) for name in SCHEDULERS for top_k in range(1, 11)
}


@st.composite
def walks(draw: st.DrawFn) -> tuple[random.Random, DeviceRules, DecisionTable, LayerTables, LayerTables, int]:
    """Two layers of random size with random contents, and how many steps to take."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    num_experts = rng.choice([8, 16, 40, 64, 128, 256])
    top_k = rng.randint(1, min(10, num_experts // 2))
    num_slots = rng.randint(1, num_experts)
    rules = DeviceRules(
        rng.choice(["mrs", "lru"]), prefetch_size=rng.randint(0, 4), admission=rng.random() < 0.7,
        bypass=rng.random() < 0.3, alpha=rng.choice([1, 1966, 32768, 65536]), top_p=rng.choice([1.0, 2.0, 3.0]),
    )  # fmt: skip
    table = TABLES[rng.choice(SCHEDULERS), top_k]
    layers = [LayerTables.empty(num_experts, num_slots) for _ in range(2)]
    for layer in layers:
        for slot, expert in enumerate(rng.sample(range(num_experts), rng.randint(0, num_slots))):
            layer.land(layer.order(expert, slot))
    return rng, rules, table, layers[0], layers[1], draw(st.integers(1, 12))


def take(
    rng: random.Random, rules: DeviceRules, table: DecisionTable, layer: LayerTables, later: LayerTables
) -> tuple[Step, list[Copy]]:
    """One step of `layer`, its copies through, and what it orders ahead of need."""
    num_experts = len(layer.slot_of)
    ids = rng.sample(range(num_experts), table.top_k)
    before, held = list(layer.expert_of), {e: layer.slot_of[e] for e in ids if layer.slot_of[e] >= 0}
    arriving = {slot for slot in range(len(layer.expert_of)) if layer.is_arriving(slot)}
    probabilities = [rng.choice([0.0, 0.1, rng.random()]) for _ in range(num_experts)]
    step = plan_step(layer, rules, table, ids, shares_of(probabilities))
    layer.check()
    for place, expert in enumerate(ids):
        doing, slot = step.doing[place], step.slots[place]
        if doing == ON_CPU:
            assert slot == -1
            assert expert not in held or layer.slot_of[expert] == held[expert], "a routed expert keeps its slot"
        else:
            assert layer.slot_of[expert] == slot and layer.expert_of[slot] == expert
        assert doing != HELD or (held[expert] == slot and slot not in arriving)
        assert doing != ARRIVING or slot in arriving
        assert (doing == BROUGHT) == any(copy.expert == expert for copy in step.copies)
    for copy in step.copies:
        assert copy.evicted not in ids, "nothing in use leaves"
        assert copy.slot not in arriving, "nor what is under way"
        assert before[copy.slot] == copy.evicted
    assert len({copy.slot for copy in step.copies}) == len(step.copies)
    assert len(step.copies) <= table.entry(step.entry).transfers
    guess = Guess(later, table, table.gains_ns(), rng.sample(range(num_experts), table.top_k))
    under_way = {slot for slot in range(len(later.expert_of)) if later.is_arriving(slot)}
    ahead, admitted = look_ahead(layer, step, [guess], rules)
    assert len(ahead) + len(admitted) <= rules.prefetch_size
    for _, copy in ahead:
        assert copy.expert in guess.ids and copy.evicted not in guess.ids and copy.slot not in under_way
    for copy in admitted:
        assert copy.expert in ids and copy.evicted not in ids
        assert copy.evicted < 0 or layer.scores[copy.expert] > layer.scores[copy.evicted]
    layer.check()
    later.check()
    for copy in step.copies:
        layer.land(copy)
    return step, [*admitted, *(copy for _, copy in ahead)]


@settings(max_examples=150, deadline=None)
@given(walks())
def test_slots_stay_unique_and_nothing_in_use_leaves(
    given_: tuple[random.Random, DeviceRules, DecisionTable, LayerTables, LayerTables, int],
) -> None:
    rng, rules, table, layer, later, num_steps = given_
    under_way: list[tuple[LayerTables, Copy]] = []
    for _ in range(num_steps):
        step, _ = take(rng, rules, table, layer, later)
        assert sorted(step.ids) == sorted(set(step.ids))
        under_way += [
            (tables, Copy(tables.expert_of[slot], slot, -1, tables.issued[slot]))
            for tables in (layer, later)
            for slot in range(len(tables.expert_of))
            if tables.is_arriving(slot)
        ]
        for tables, copy in list(under_way):
            if rng.random() < 0.5:
                tables.land(copy)
                under_way.remove((tables, copy))
        under_way = [entry for entry in under_way if entry[0].is_arriving(entry[1].slot)]
        layer, later = later, layer
    assert all(0 <= score <= (1 << SCORE_BITS) + 1 for score in layer.scores) or rules.policy == "lru"


def test_numbers_of_a_plan_are_the_tables() -> None:
    rng = random.Random(5)
    table = TABLES["balanced", 8]
    layer = LayerTables.empty(64, 32)
    for slot in range(32):
        layer.land(layer.order(slot, slot))
    for held in range(9):
        ids = [*rng.sample(range(32), held), *rng.sample(range(32, 64), 8 - held)]
        fresh = LayerTables(*(list(part) for part in (layer.slot_of, layer.expert_of, layer.scores)),
                            list(layer.issued), list(layer.landed), layer.clock, layer.num_copies)  # fmt: skip
        step = plan_step(fresh, DeviceRules(), table, ids, shares_of([1 / 64] * 64))
        said = table.decision(held, 0, 8 - held)
        assert len(step.copies) == said.transfers
        assert sum(doing == HELD for doing in step.doing) == held - said.left


def test_the_missing_that_are_worth_most_are_brought_and_the_held_that_are_worth_least_left() -> None:
    cost = cost_of("a6000-xeon5220r", "qwen3-30b-a3b")
    table = DecisionTable(make_scheduler("balanced", {}), cost, 8)
    layer = LayerTables.empty(16, 10)
    for slot in range(8):
        layer.land(layer.order(slot, slot))
    layer.scores[:] = [100 + expert for expert in range(16)]
    said = table.decision(8, 0, 0)
    assert said.left, "on this machine the GPU is the slower for some"
    step = plan_step(layer, DeviceRules(alpha=1), table, list(range(8)), [0] * 16)
    assert [expert for expert, doing in zip(step.ids, step.doing, strict=True) if doing == ON_CPU] == [
        *range(said.left)
    ]
    layer.scores[:] = [100 + expert for expert in range(16)]
    step = plan_step(layer, DeviceRules(alpha=1), TABLES["gpu_only", 8], [0, 1, 2, 3, 8, 9, 15, 10], [0] * 16)
    assert [copy.expert for copy in step.copies] == [15, 10, 9, 8]
    assert [(copy.slot, copy.evicted) for copy in step.copies] == [(8, -1), (9, -1), (4, 4), (5, 5)], "free ones first"


def test_bypass_leaves_what_is_worth_less_to_the_cpu() -> None:
    for bypass in (False, True):
        layer = LayerTables.empty(4, 2)
        for slot in range(2):
            layer.land(layer.order(slot, slot))
        layer.scores[:] = [1 << 20, 1 << 20, 0, 0]
        step = plan_step(layer, DeviceRules(bypass=bypass), TABLES["gpu_only", 1], [2], [0, 0, 1 << 10, 0])
        assert step.doing == ((ON_CPU,) if bypass else (BROUGHT,))


def test_where_no_slot_may_be_had_the_cpu_computes() -> None:
    layer = LayerTables.empty(8, 2)
    layer.land(layer.order(0, 0))
    layer.order(1, 1)
    step = plan_step(layer, DeviceRules(), TABLES["gpu_only", 3], [0, 5, 6], [0] * 8)
    assert step.doing == (HELD, ON_CPU, ON_CPU) and not step.copies


def test_scores_are_the_hosts_averages() -> None:
    """To the rounding of a device's units, over many steps."""
    rng = random.Random(11)
    spec = LayerSpec(0, 64, 6, 1, 16)
    [policy] = make_policies("mrs", [spec], {"alpha": 0.05})
    rules = DeviceRules.of("mrs", {"alpha": 0.05}, prefetch_size=0, admission=False)
    layer, table = LayerTables.empty(64, 16), TABLES["cpu_only", 6]
    for _ in range(300):
        powers = [rng.random() ** 8 for _ in range(64)]
        probabilities = [power / sum(powers) for power in powers]
        ids = sorted(range(64), key=probabilities.__getitem__, reverse=True)[:6]
        policy.touch(Routing(0, dict.fromkeys(ids, 1), 1, probabilities))
        plan_step(layer, rules, table, ids, shares_of(probabilities))
    for ours, theirs in zip(layer.scores, policy.standing(), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3, abs=64)


def test_shares_are_rounded_down_and_kept_from_0_to_1() -> None:
    found = shares_of([0.0, 1.0, 0.5, 2.0, -1.0, 1e-9, float("nan")])
    assert found == [0, 1 << SHARE_BITS, 1 << (SHARE_BITS - 1), 1 << SHARE_BITS, 0, 0, 0]


@pytest.mark.parametrize("policy", ["mrs", "lru"])
@pytest.mark.parametrize("profile", ["rtx4090-cpu16", "rtx3090-cpu8", "a6000-xeon5220r"])
def test_both_planners_decide_alike_in_the_same_state(policy: str, profile: str) -> None:
    """The same numbers of experts, the same predicted time, the same experts evicted; which are brought may differ."""
    rng, cost = random.Random(4), cost_of(profile, "qwen3-30b-a3b")
    host = Coordinator([LayerSpec(0, 64, 8, 2_860_000, 20)], cost, Strategy(policy=policy, prefetch_size=0))
    host.initial_transfers()
    table, rules = DecisionTable(host.scheduler, cost, 8), rules_of(host.strategy)
    num_evicted, popularity = 0, [rng.random() ** 4 for _ in range(64)]
    for _ in range(300):
        powers = [share * rng.random() for share in popularity]
        probabilities = [power / sum(powers) for power in powers]
        ids = sorted(range(64), key=probabilities.__getitem__, reverse=True)[:8]
        state = host.hand_over(0)
        step = plan_step(state, rules, table, ids, shares_of(probabilities))
        planned = as_plan(host.layers()[0][0], step, table, state.issued)
        plan = host.plan(Routing(0, dict.fromkeys(ids, 1), 1, probabilities))
        assert (len(planned.cpu), len(planned.gpu)) == (len(plan.cpu), len(plan.gpu))
        assert (planned.num_hits, planned.makespan_s, planned.cpu_s) == (plan.num_hits, plan.makespan_s, plan.cpu_s)
        assert {t.evicted for t in planned.transfers} == {t.evicted for t in plan.transfers}
        num_evicted += len(plan.transfers)
        host.finish(plan)
    assert num_evicted, "somebody had to leave"


@pytest.mark.parametrize("policy", ["mrs", "lru"])
def test_a_host_goes_on_where_a_device_stopped(policy: str) -> None:
    """And the device where the host did: prompts between tokens change nothing but by what they route to."""
    rng = random.Random(2)
    specs = [LayerSpec(layer, 32, 4, 2_860_000, 12) for layer in range(3)]
    host = Coordinator(specs, COST, Strategy(policy=policy, prefetch_size=2))
    host.initial_transfers()
    coordinator = DeviceCoordinator(host)
    for step in range(40):
        num_tokens = 5 if step % 7 == 3 else 1
        for layer in range(3):
            ids = rng.sample(range(32), 4)
            plan = coordinator.plan(Routing(layer, dict.fromkeys(ids, 1), num_tokens, [rng.random() / 32] * 32))
            assert sorted([*plan.cpu, *plan.gpu]) == sorted(ids)
            coordinator.prefetch(plan)
            coordinator.finish(plan)
        if num_tokens > 1:
            before = [host.slots_of(layer) for layer in range(3)]
            tables = [host.hand_over(layer) for layer in range(3)]
            for layer in range(3):
                assert tables[layer].slot_of == list(before[layer])
                worth = host.hand_over(layer).scores
                host.take_back(layer, tables[layer])
                assert host.hand_over(layer).scores == pytest.approx(worth, abs=2)
            host.check_integrity()
    assert coordinator.stats is host.stats and host.stats.num_plans == 120


def test_a_policy_that_devices_do_not_have_is_named() -> None:
    with pytest.raises(ConfigError, match="keeps experts by mrs or lru, not by 'adaptive'"):
        rules_of(Strategy())
    host = Coordinator([LayerSpec(0, 8, 2, 1, 4)], COST, Strategy())
    with pytest.raises(ConfigError, match="adaptive is not kept on a device"):
        host.hand_over(0)
