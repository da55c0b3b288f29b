"""The CPU's real speed, learnt in service: it is followed, and noise is not."""

from __future__ import annotations

import random

import pytest

from hybrimoe_kt.core.coordinator import Coordinator
from hybrimoe_kt.core.cost import CostModel
from hybrimoe_kt.core.feedback import Overhead, Pace
from hybrimoe_kt.core.strategy import Strategy
from hybrimoe_kt.core.types import LayerSpec, Routing


def run(pace: Pace, true_factor: float, num_shares: int, noise: float = 0.0, seed: int = 0) -> int:
    """Shares that really take `true_factor` times the profile's seconds; how often the pace changed."""
    draw = random.Random(seed)
    return sum(
        pace.observe(0.002 * pace.factor, 0.002 * true_factor * draw.lognormvariate(0.0, noise))
        for _ in range(num_shares)
    )


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.3, 2.0, 3.5])
def test_a_steady_factor_is_found(factor: float) -> None:
    pace = Pace()
    run(pace, factor, 256, noise=0.1)
    assert pace.factor == pytest.approx(factor, rel=0.06)


def test_noise_is_not_followed() -> None:
    pace = Pace()
    changes = run(pace, 1.0, 64 * 100, noise=0.15)
    assert pace.factor == pytest.approx(1.0, rel=0.06)
    assert changes <= 10


def test_extremes_are_bounded() -> None:
    pace = Pace(limit=2.0)
    run(pace, 100.0, 800)
    assert pace.factor == pytest.approx(2.0, rel=0.05)
    run(pace, 0.001, 800)
    assert pace.factor == pytest.approx(0.5, rel=0.05)


def test_a_share_that_had_ended_counts_only_if_it_was_quick() -> None:
    pace = Pace(window=4)
    assert not any(pace.observe(0.001, 0.003, is_bound=True) for _ in range(50))
    assert pace.factor == 1.0
    assert any(pace.observe(0.001 * pace.factor, 0.0005, is_bound=True) for _ in range(4))
    assert pace.factor == pytest.approx(0.5, rel=0.05)


def test_a_cpu_that_costs_nothing_has_no_pace() -> None:
    pace = Pace(window=1)
    assert not pace.observe(0.0, 0.001)
    assert pace.factor == 1.0


def test_plans_follow_the_pace() -> None:
    """A slow CPU gets less; back at its usual pace the plan is the first one again."""
    specs = [LayerSpec(0, num_experts=16, top_k=8, num_slots=12, expert_bytes=1_000_000)]
    cost = CostModel(
        cpu=lambda load: 1e-3 * load,
        gpu=lambda load: 0.5e-3,
        link_bytes_per_s=1e9,
        expert_bytes=1_000_000,
    )
    coordinator = Coordinator(specs, cost, Strategy(prefetch_size=0, admission=False, policy="lru"))
    coordinator.initial_transfers()
    routing = Routing(0, dict.fromkeys((4, 5, 6, 7, 8, 9, 14, 15), 1))

    def num_on_cpu(pace: float) -> tuple[int, float]:
        coordinator.set_pace(pace)
        plan = coordinator.plan(routing)
        coordinator.finish(plan)
        return len(plan.cpu), plan.cpu_s

    at_first, slow, at_last = (num_on_cpu(pace) for pace in (1.0, 3.9, 1.0))
    assert slow[0] < at_first[0], (slow, at_first)
    assert at_last[0] >= slow[0]
    assert at_last[1] == pytest.approx(1e-3 * at_last[0])


def test_an_overhead_is_learnt_whatever_steps_compute() -> None:
    """Steps end 0.3 ms late, but for a few that were interrupted; after one window predictions are right."""
    overhead, draw = Overhead(window=16), random.Random(3)
    for number in range(64):
        true_s = draw.choice((1e-3, 2e-3, 5e-3)) + 3e-4
        predicted_s = true_s - 3e-4 + overhead.more_s
        measured_s = true_s * (10.0 if number % 8 == 0 else 1.0)
        assert overhead.observe(predicted_s, measured_s) == (number == 15)
    assert overhead.more_s == pytest.approx(3e-4)


def test_what_a_calibration_left_is_corrected_soon() -> None:
    overhead = Overhead()
    changed = [number for number in range(200) if overhead.observe(2e-3 + overhead.more_s, 2.5e-3 + number * 1e-5)]
    assert changed == [15, 79, 143]


def test_scatter_is_no_overhead() -> None:
    overhead, draw = Overhead(window=16), random.Random(4)
    assert not any(overhead.observe(2e-3, 2e-3 * draw.uniform(0.98, 1.02)) for _ in range(160))


@pytest.mark.parametrize("more_s", [2e-4, -1.0])
def test_an_overhead_moves_predictions_and_no_decision(more_s: float) -> None:
    """By that much, and never below what the plan's own work takes."""
    specs = [LayerSpec(0, num_experts=16, top_k=8, num_slots=12, expert_bytes=1_000_000)]
    cost = CostModel(
        cpu=lambda load: 1e-3 * load,
        gpu=lambda load: 0.5e-3,
        link_bytes_per_s=1e9,
        expert_bytes=1_000_000,
        step_overhead_s=1e-4,
    )
    plans = []
    for added_s in (0.0, more_s):
        coordinator = Coordinator(specs, cost, Strategy(prefetch_size=0, admission=False, policy="lru"))
        coordinator.initial_transfers()
        coordinator.set_pace(1.0, 1.0, added_s)
        plans.append(coordinator.plan(Routing(0, dict.fromkeys((4, 5, 6, 7, 8, 9, 14, 15), 1))))
    usual, changed = plans
    assert changed.makespan_s - usual.makespan_s == pytest.approx(max(more_s, -1e-4))
    assert (changed.cpu, changed.gpu, changed.transfers) == (usual.cpu, usual.gpu, usual.transfers)
