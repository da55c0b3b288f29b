"""Steps that are the CPU's whatever is routed: counted without a plan, they leave what planning them would leave."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrimoe_kt.core.coordinator import Coordinator
from hybrimoe_kt.core.types import Phase, Routing
from tests.core.instances import routed_loads
from tests.core.walks import make_coordinator, walk

PHASES: tuple[Phase | None, ...] = (None, "prefill", "decode")


def steps(seed: int, number: int, layers: int = 3) -> list[Routing]:
    """Prompts, single tokens and several sequences that decode together, in any order."""
    rng = random.Random(seed)
    drawn = []
    for _ in range(number):
        num_tokens = rng.choice([1, 1, 1, 2, 5, 40])
        loads = routed_loads(rng, 16, rng.choice([1, 4]), num_tokens)
        drawn.append(Routing(rng.randrange(layers), loads, num_tokens, phase=rng.choice(PHASES)))
    return drawn


def count(coordinator: Coordinator, routing: Routing) -> float:
    layer, loads, num_tokens = routing.layer, routing.loads, routing.num_tokens
    return coordinator.count_on_cpu(layer, loads, num_tokens, is_decode=routing.is_decode)


def assert_alike(one: Coordinator, other: Coordinator) -> None:
    assert one.stats.snapshot() == other.stats.snapshot()
    assert (one.heat(), one.last_token(), one.now_s) == (other.heat(), other.last_token(), other.now_s)


@settings(deadline=None)
@given(seed=st.integers(0, 2**16), profile=st.sampled_from(["cpu-only", "default", "a6000-xeon5220r"]))
def test_counts_what_a_plan_counts(seed: int, profile: str) -> None:
    planned, counted = make_coordinator(0, profile=profile), make_coordinator(0, profile=profile)
    for routing in steps(seed, 12):
        plan = planned.plan(routing)
        planned.prefetch(plan)
        planned.finish(plan)
        assert count(counted, routing) == plan.makespan_s
        assert_alike(planned, counted)


@settings(deadline=None)
@given(seed=st.integers(0, 2**16))
def test_after_the_slots_are_gone(seed: int) -> None:
    """What had been predicted for a layer is judged by its next step, which finds no slots any more."""
    planned, counted = (make_coordinator(4, scheduler="paper", prefetch_size=2) for _ in range(2))
    for coordinator in (planned, counted):
        coordinator.initial_transfers()
        routings = walk(seed, 4)
        for place, routing in enumerate(routings[: 6 + seed % 3]):
            plan = coordinator.plan(routing)
            coordinator.prefetch(plan, routings[place + 1 : place + 3])
            coordinator.finish(plan)
        assert any(state.predicted for state in coordinator._layers.values())
        for layer in range(3):
            coordinator.resize(layer, 0)
    for routing in steps(seed, 8):
        planned.finish(planned.plan(routing))
        count(counted, routing)
        assert_alike(planned, counted)


def test_a_pace_is_heard() -> None:
    """What is remembered of single tokens is remembered of one cost."""
    planned, counted = make_coordinator(0), make_coordinator(0)
    for pace in (1.0, 2.0, 1.0):
        for coordinator in (planned, counted):
            coordinator.set_pace(pace)
        for routing in steps(3, 6):
            planned.finish(planned.plan(routing))
            count(counted, routing)
            assert_alike(planned, counted)


def test_a_layer_with_slots_is_refused() -> None:
    with pytest.raises(AssertionError, match="a layer that has slots is planned"):
        count(make_coordinator(4), steps(0, 1)[0])
