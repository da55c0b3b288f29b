"""The fixed schedulers, and the names and options of all."""

from __future__ import annotations

import random

import pytest

from hybrimoe_kt.core.cost import CostModel
from hybrimoe_kt.core.schedule import SCHEDULERS, make_scheduler
from hybrimoe_kt.core.schedule.base import Task
from hybrimoe_kt.errors import ConfigError
from tests.core.instances import random_task

COST = CostModel(cpu=lambda n: 5.0 * n, gpu=lambda n: 1.0, link_bytes_per_s=1.0, expert_bytes=6)


def assigned(name: str, task: Task) -> tuple[list[int], list[int], list[int]]:
    found = make_scheduler(name, {}).assign(task)
    return sorted(found.cpu), sorted(found.gpu), sorted(found.transfers)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("static", ([2, 3], [0, 1], [])),
        ("layer_split", ([0, 1, 2, 3], [], [])),
        ("gpu_only", ([], [0, 1, 2, 3], [2, 3])),
        ("cpu_only", ([0, 1, 2, 3], [], [])),
        ("fiddler", ([2], [0, 1, 3], [3])),
        ("one_ratio", ([2], [0, 1, 3], [3])),
    ],
)
def test_fixed_assignments(name: str, expected: tuple[list[int], list[int], list[int]]) -> None:
    assert assigned(name, Task(COST, {0: 1, 1: 2, 2: 1, 3: 2}, [0, 1], [2, 3])) == expected


def test_layer_split_uses_the_gpu_when_all_stand_there() -> None:
    assert assigned("layer_split", Task(COST, {0: 1, 1: 2}, [0, 1], [])) == ([], [0, 1], [])


def test_without_any_slot_everything_runs_on_the_cpu() -> None:
    for name in SCHEDULERS:
        assert assigned(name, Task(COST, {0: 1, 1: 9}, [], [0, 1], num_free=0)) == ([0, 1], [], []), name


@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_every_scheduler_partitions_the_routed_experts(name: str) -> None:
    rng, scheduler = random.Random(0), make_scheduler(name, {})
    for _ in range(100):
        task = random_task(rng, max_experts=64, limited_slots=True)
        found = scheduler.assign(task)
        assert sorted([*found.cpu, *found.gpu]) == sorted(task.loads)
        assert [e for e in found.gpu if e in set(found.transfers)] == list(found.transfers)
        assert scheduler.makespan_s(task) == found.makespan_s
        again = scheduler.assign(task)
        assert (list(again.cpu), list(again.gpu)) == (list(found.cpu), list(found.gpu))


def test_names_and_options_are_checked() -> None:
    with pytest.raises(ConfigError, match="did you mean 'balanced'"):
        make_scheduler("balancd", {})
    with pytest.raises(ConfigError, match="did you mean 'exact_experts'"):
        make_scheduler("balanced", {"exact_expert": 3})
    with pytest.raises(ConfigError, match="give a number"):
        make_scheduler("balanced", {"exact_experts": "many"})
