"""Planning and bookkeeping times of the policy core.

    python -m pytest benchmarks/bench_core.py --benchmark-enable --benchmark-only --benchmark-columns=median,iqr

Goals, medians: a decode layer (8 of 128) planned in 30 us, a prefill layer (128 experts) in 300 us, cache
bookkeeping of a layer in 20 us.

Measured 2026-11-23 on two shared cores of an AMD EPYC (AVX2, Python 3.11.7) with both busy (load 1.9), so the medians
are about twice what an idle core gives; the minimum is the idle core's. Microseconds, minimum / median:

    assign a decode layer             balanced 3.0 / 4.2      paper 12 / 21
    assign a prefill layer, free      balanced 66 / 123       paper 140 / 211
    assign a prefill layer, no slot   balanced 198 / 354      paper 178 / 339
    cache bookkeeping, decode layer   adaptive 20 / 41        mrs 2.3 / 3.1     lru 2.0 / 4.3
    plan + finish, decode layer       adaptive 27 / 100       mrs 15 / 54       lru 15 / 50
    plan + prefetch + finish          adaptive 47 / 184
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest

from hybrimoe_kt.core.coordinator import Coordinator
from hybrimoe_kt.core.cost import CostModel
from hybrimoe_kt.core.policies import make_policies
from hybrimoe_kt.core.schedule import make_scheduler
from hybrimoe_kt.core.schedule.base import Task
from hybrimoe_kt.core.strategy import Strategy
from hybrimoe_kt.core.types import LayerSpec, Routing
from hybrimoe_kt.profiles import load_profile

NUM_EXPERTS, TOP_K, NUM_SLOTS, NUM_LAYERS, EXPERT_BYTES = 128, 8, 32, 8, 2_860_000
COST = CostModel.from_profile(load_profile("default"), expert_bytes=EXPERT_BYTES)
SPECS = [LayerSpec(layer, NUM_EXPERTS, TOP_K, EXPERT_BYTES, NUM_SLOTS) for layer in range(NUM_LAYERS)]


def decode_routings(count: int, seed: int = 1) -> list[Routing]:
    """Return single tokens, layer after layer, with the skew and reuse of a real model's routing."""
    rng = random.Random(seed)
    popularity = [[rng.random() ** 3 + 0.01 for _ in range(NUM_EXPERTS)] for _ in range(NUM_LAYERS)]
    result = []
    for _, layer in itertools.product(range(count // NUM_LAYERS), range(NUM_LAYERS)):
        keys = [rng.random() ** (1 / p) for p in popularity[layer]]
        chosen = sorted(range(NUM_EXPERTS), key=keys.__getitem__, reverse=True)[:TOP_K]
        result.append(Routing(layer, dict.fromkeys(chosen, 1), 1, None, dict.fromkeys(chosen, 1 / TOP_K)))
    return result


def prefill_loads(seed: int = 1) -> dict[int, int]:
    """Return loads of a prompt of some 500 tokens on all 128 experts."""
    rng = random.Random(seed)
    return {expert: 1 + int(60 * rng.random() ** 2) for expert in range(NUM_EXPERTS)}


@pytest.mark.parametrize("scheduler", ["balanced", "paper"])
def test_assign_a_decode_layer(benchmark: Any, scheduler: str) -> None:
    assign = make_scheduler(scheduler, {}).assign
    rng, tasks = random.Random(2), []
    for _ in range(256):
        num_held = rng.randint(3, 8)
        backlog_s = rng.choice([0.0, rng.random() * COST.expert_transfer_s])
        tasks.append(
            Task(
                COST,
                dict.fromkeys(range(TOP_K), 1),
                list(range(num_held)),
                list(range(num_held, TOP_K)),
                link_busy_s=backlog_s,
            )
        )
    cycle = itertools.cycle(tasks)
    benchmark(lambda: assign(next(cycle)))


@pytest.mark.parametrize("scheduler", ["balanced", "paper"])
@pytest.mark.parametrize("num_free", [128, 0], ids=["free", "full"])
def test_assign_a_prefill_layer(benchmark: Any, scheduler: str, num_free: int) -> None:
    loads = prefill_loads()
    held = list(range(0, NUM_EXPERTS, 4))
    missing = [e for e in loads if e % 4]
    task = Task(COST, loads, held, missing, num_free=num_free)
    benchmark(make_scheduler(scheduler, {}).assign, task)


@pytest.mark.parametrize("policy", ["adaptive", "mrs", "lru"])
def test_cache_bookkeeping_of_a_decode_layer(benchmark: Any, policy: str) -> None:
    """Tell the policy what was routed and rank the 26 experts that could go."""
    policies = make_policies(policy, SPECS, {})
    routings = itertools.cycle(decode_routings(2048))
    candidates = list(range(26))

    def step() -> None:
        routing = next(routings)
        policies[routing.layer].touch(routing)
        policies[routing.layer].rank(candidates)

    for _ in range(2048):
        step()
    benchmark(step)


def whole_layer(policy: str, prefetch_size: int) -> Callable[[], None]:
    coordinator = Coordinator(SPECS, COST, Strategy(policy=policy, prefetch_size=prefetch_size))
    coordinator.initial_transfers()
    routings = itertools.cycle(decode_routings(2048))

    def step() -> None:
        routing = next(routings)
        plan = coordinator.plan(routing)
        coordinator.prefetch(plan)
        coordinator.finish(plan)

    for _ in range(2048):
        step()
    return step


@pytest.mark.parametrize("policy", ["adaptive", "mrs", "lru"])
def test_plan_and_finish_a_decode_layer(benchmark: Any, policy: str) -> None:
    benchmark(whole_layer(policy, prefetch_size=0))


def test_plan_prefetch_and_finish_a_decode_layer(benchmark: Any) -> None:
    benchmark(whole_layer("adaptive", prefetch_size=1))
