"""Speed held by counting, not by the clock: function calls and executed lines per decision.

The limits are a quarter above what CPython 3.11 needed when they were set.
"""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from hybrimoe_kt.core.coordinator import Coordinator
from hybrimoe_kt.core.policies import make_policies
from hybrimoe_kt.core.schedule import make_scheduler
from hybrimoe_kt.core.schedule.base import Task
from hybrimoe_kt.core.strategy import Strategy
from hybrimoe_kt.core.types import LayerSpec, Routing
from tests.core.instances import cost_of

COST = cost_of("default", "qwen3-30b-a3b")


def count_lines(run: Callable[[], object]) -> int:
    """Return how many lines of Python `run` executes, comprehensions' included."""
    lines = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal lines
        if event == "line":
            lines += 1
        return trace

    before = sys.gettrace()
    gc.disable()  # Hypothesis counts collections in Python, whose lines would be counted too
    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(before)
        gc.enable()
    return lines


def routings(seed: int, count: int, layers: int) -> list[Routing]:
    rng = random.Random(seed)
    result = []
    for step in range(count):
        chosen = rng.sample(range(40), 6) + rng.sample(range(40, 128), 2)
        result.append(Routing(step % layers, dict.fromkeys(chosen, 1), 1, None, dict.fromkeys(chosen, 0.125)))
    return result


def test_assign_a_decode_layer() -> None:
    assign = make_scheduler("balanced", {}).assign
    tasks = [
        Task(COST, dict.fromkeys(range(8), 1), list(range(n)), list(range(n, 8)), link_busy_s=n * 1e-5)
        for n in range(9)
    ]
    cold = max(count_lines(lambda task=task: assign(task)) for task in tasks)  # type: ignore[misc]
    warm = max(count_lines(lambda task=task: assign(task)) for task in tasks)  # type: ignore[misc]
    print(f"lines per decode assignment: {cold} first time, {warm} remembered")
    assert cold <= 200
    assert warm <= 30


@pytest.mark.parametrize(("num_free", "limit"), [(128, 2600), (0, 4800)], ids=["free", "full"])
def test_assign_a_prefill_layer(num_free: int, limit: int) -> None:
    loads = {expert: 1 + 60 * ((expert * 37) % 128) // 128 for expert in range(128)}
    task = Task(COST, loads, list(range(0, 128, 4)), [e for e in loads if e % 4], num_free=num_free)
    lines = count_lines(lambda: make_scheduler("balanced", {}).assign(task))
    print(f"lines per prefill assignment: {lines}")
    assert lines <= limit


@pytest.mark.parametrize(("policy", "limit"), [("lru", 40), ("mrs", 40), ("adaptive", 320)])
def test_policy_per_layer(policy: str, limit: int) -> None:
    specs = [LayerSpec(layer, 128, 8, 1, 32) for layer in range(6)]
    policies = make_policies(policy, specs, {})
    for routing in routings(1, 1200, 6):
        policies[routing.layer].touch(routing)
    measured = routings(2, 60, 6)

    def run() -> None:
        for routing in measured:
            policies[routing.layer].touch(routing)
            policies[routing.layer].rank(range(24))

    lines = count_lines(run) / len(measured)
    print(f"lines per layer of {policy}: {lines:.0f}")
    assert lines <= limit


def test_whole_decode_layer() -> None:
    coordinator = Coordinator(
        [LayerSpec(layer, 128, 8, 2_860_000, 32) for layer in range(6)], COST, Strategy(policy="lru")
    )
    coordinator.initial_transfers()

    def run(steps: list[Routing]) -> None:
        for routing in steps:
            plan = coordinator.plan(routing)
            coordinator.prefetch(plan)
            coordinator.finish(plan)

    run(routings(1, 600, 6))
    measured = routings(2, 60, 6)
    lines = count_lines(lambda: run(measured)) / len(measured)
    print(f"lines per whole decode layer: {lines:.0f}")
    assert lines <= 860
