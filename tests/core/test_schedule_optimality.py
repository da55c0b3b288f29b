"""`balanced` against exact optima, and never behind the paper's greedy, over random instances of the profiles."""

from __future__ import annotations

import random
from statistics import fmean

import pytest

from hybrimoe_kt.core.schedule import make_scheduler
from hybrimoe_kt.core.schedule.base import Task, evaluate
from tests.core.instances import random_task
from tests.core.oracle import can_be_beaten, depth_first, exhaustive

BALANCED = make_scheduler("balanced", {})
PAPER = make_scheduler("paper", {})


def assert_consistent(task: Task) -> float:
    """Check what any assignment promises; return the makespan."""
    found = BALANCED.assign(task)
    assert sorted([*found.cpu, *found.gpu]) == sorted(task.loads)
    assert set(found.transfers) == set(task.missing) & set(found.gpu)
    again = evaluate(task, found.cpu, found.gpu, found.transfers)
    for name in ("makespan_s", "cpu_s", "gpu_s", "link_s"):
        assert getattr(found, name) == pytest.approx(getattr(again, name), rel=1e-9, abs=1e-12), name
    return found.makespan_s


def gaps(seed: int, count: int, **limits: object) -> tuple[list[float], list[float]]:
    """Return the relative gaps of balanced and of paper to the optimum."""
    rng = random.Random(seed)
    ours, theirs = [], []
    for _ in range(count):
        task = random_task(rng, max_tokens=1024, **limits)  # type: ignore[arg-type]
        best = depth_first(task)
        ours.append(assert_consistent(task) / best - 1)
        theirs.append(PAPER.assign(task).makespan_s / best - 1)
    return ours, theirs


def test_optimal_up_to_twelve_experts() -> None:
    ours, theirs = gaps(seed=1, count=2000, max_experts=12)
    print(f"2000 instances, <= 12 experts: balanced mean {fmean(ours):.2e} max {max(ours):.2e}; ", end="")
    print(f"paper mean {fmean(theirs):.4f} max {max(theirs):.3f}")
    assert fmean(ours) <= 1e-6
    assert max(ours) <= 1e-6
    assert min(ours) >= -1e-6, "the oracle is no optimum"


def test_depth_first_oracle_is_the_exhaustive_one() -> None:
    rng = random.Random(2)
    for _ in range(150):
        task = random_task(rng, max_experts=8, max_tokens=1024)
        assert depth_first(task) == pytest.approx(exhaustive(task), rel=1e-9)


def test_no_other_link_order_is_better() -> None:
    rng = random.Random(3)
    for _ in range(150):
        task = random_task(rng, max_experts=5, max_tokens=1024)
        assert assert_consistent(task) <= exhaustive(task, all_link_orders=True) * (1 + 1e-9)


def test_no_program_is_one_percent_better_up_to_64_experts() -> None:
    rng = random.Random(4)
    verdicts = []
    for _ in range(60):
        task = random_task(rng, max_experts=64, max_tokens=1024, with_pending=False, with_contention=False)
        verdicts.append(can_be_beaten(task, 0.99 * assert_consistent(task)))
    print(f"60 instances, <= 64 experts: {verdicts.count(False)} proven within 1 %, {verdicts.count(None)} undecided")
    assert True not in verdicts
    assert verdicts.count(False) >= 40, "the solver decides most within its time limit"


@pytest.mark.parametrize("limited_slots", [False, True], ids=["free", "few slots"])
def test_never_behind_the_paper(limited_slots: bool) -> None:
    rng = random.Random(5)
    for _ in range(2000):
        task = random_task(rng, max_experts=128, max_tokens=1024, limited_slots=limited_slots)
        slack = 1e-2 if limited_slots and len(task.loads) > 64 else 1e-9  # there planning time counts for more
        assert assert_consistent(task) <= PAPER.assign(task).makespan_s * (1 + slack)


@pytest.mark.slow
def test_optimal_on_many_more_instances() -> None:
    ours, theirs = gaps(seed=6, count=20000, max_experts=12)
    print(f"balanced mean {fmean(ours):.2e} max {max(ours):.2e}; paper mean {fmean(theirs):.4f} max {max(theirs):.3f}")
    assert max(ours) <= 1e-6
