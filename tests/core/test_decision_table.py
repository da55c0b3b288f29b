"""Decision tables say what their scheduler says, for every number of experts, whatever the machine."""

from __future__ import annotations

import random

import pytest

from hybrimoe_kt.core.cost import CostModel
from hybrimoe_kt.core.decision_table import FIELD_BITS, DecisionTable
from hybrimoe_kt.core.schedule import SCHEDULERS, make_scheduler
from hybrimoe_kt.core.schedule.base import Task, evaluate
from hybrimoe_kt.errors import ConfigError
from tests.core.instances import GPU_PROFILES, MODELS, cost_of

DEVICE_SCHEDULERS = ("balanced", "paper", "fiddler", "static", "gpu_only", "cpu_only", "one_ratio")


def random_cost(rng: random.Random) -> CostModel:
    """A machine between fast and slow in every part; a third of them with nothing but whole numbers, for ties."""
    if rng.random() < 1 / 3:
        cpu, gpu, link = (float(rng.randint(1, 6)) for _ in range(3))
        return CostModel(cpu=lambda n: cpu * n, gpu=lambda n: gpu, link_bytes_per_s=1.0, expert_bytes=int(link))
    cpu_s, gpu_s = 10 ** rng.uniform(-5, -2), 10 ** rng.uniform(-6, -3)
    return CostModel(
        cpu=lambda n: cpu_s * n, gpu=lambda n: gpu_s * n, cpu_call_s=rng.choice([0.0, 2e-5]),
        cpu_slowdown=rng.choice([1.0, 1.0, 1.3]), link_latency_s=1e-5, link_bytes_per_s=10 ** rng.uniform(9, 11),
        expert_bytes=rng.randint(10**5, 10**8), shared_expert_s=rng.choice([0.0, 1e-4]),
        dense_s=10 ** rng.uniform(-5, -3), step_overhead_s=rng.choice([0.0, 3e-5]),
    )  # fmt: skip


def check(name: str, cost: CostModel, top_k: int, rng: random.Random) -> None:
    """Ask the scheduler again, for experts of other numbers in another order."""
    scheduler, table = make_scheduler(name, {}), DecisionTable(make_scheduler(name, {}), cost, top_k)
    for held in range(top_k + 1):
        for arriving in range(top_k + 1 - held):
            for missing in range(top_k + 1 - held - arriving):
                experts = rng.sample(range(256), held + arriving + missing)
                if not experts:
                    continue
                waiting = experts[held : held + arriving]
                arrival_s = {e: (place + 1) * cost.expert_transfer_s for place, e in enumerate(waiting)}
                task = Task(
                    cost, dict.fromkeys(rng.sample(experts, len(experts)), 1), experts[: held + arriving],
                    experts[held + arriving :], arrival_s=arrival_s, link_busy_s=arriving * cost.expert_transfer_s,
                    shared_s=cost.shared_s[1],
                )  # fmt: skip
                found, said = scheduler.assign(task), table.decision(held, arriving, missing)
                on_cpu = set(found.cpu)
                assert said.transfers == len(found.transfers)
                assert said.left == len(on_cpu & set(experts[:held]))
                assert said.given_up == len(on_cpu & set(waiting))
                assert said.makespan_s == found.makespan_s + cost.step_overhead_s
                chosen = waiting[arriving - said.given_up :] if said.given_up else []
                assert on_cpu & set(waiting) == set(chosen), "the last to land are given up"


@pytest.mark.parametrize("seed", [pytest.param(n, marks=() if n < 50 else pytest.mark.slow) for n in range(200)])
def test_a_table_is_its_scheduler_on_random_machines(seed: int) -> None:
    rng = random.Random(seed)
    check(DEVICE_SCHEDULERS[seed % 3], random_cost(rng), rng.choice([1, 2, 4, 6]), rng)


@pytest.mark.parametrize("name", DEVICE_SCHEDULERS)
def test_a_table_is_its_scheduler_on_known_machines(name: str) -> None:
    rng = random.Random(7)
    for profile in GPU_PROFILES:
        for model, (_, top_k, _, _) in MODELS.items():
            check(name, cost_of(profile, model), top_k, rng)


def test_the_largest_choice_of_experts() -> None:
    rng = random.Random(3)
    check("balanced", random_cost(rng), 10, rng)


def test_every_scheduler_is_looked_at() -> None:
    assert set(DEVICE_SCHEDULERS) | {"layer_split"} == set(SCHEDULERS)


def test_a_plan_of_the_table_takes_what_it_says() -> None:
    cost = cost_of("rtx4090-cpu16", "qwen3-30b-a3b")
    table = DecisionTable(make_scheduler("balanced", {}), cost, 8)
    said = table.decision(3, 0, 5)
    held, missing = [0, 1, 2], [3, 4, 5, 6, 7]
    task = Task(cost, dict.fromkeys(range(8), 1), held, missing, shared_s=cost.shared_s[1])
    arriving, kept = missing[: said.transfers], held[said.left :]
    found = evaluate(task, [*missing[said.transfers :], *held[: said.left]], [*kept, *arriving], arriving)
    assert found.makespan_s + cost.step_overhead_s == pytest.approx(said.makespan_s)
    assert said.gpu_s == pytest.approx(found.gpu_s) and said.cpu_s == pytest.approx(found.cpu_s)


def test_gains_are_differences_of_makespans() -> None:
    table = DecisionTable(make_scheduler("balanced", {}), cost_of("rtx3090-cpu8", "qwen3-30b-a3b"), 8)
    gains = table.gains_ns()
    for held, arriving, missing in ((0, 0, 8), (3, 1, 4), (7, 0, 1)):
        wanted = table.decision(held, arriving, missing).makespan_s
        wanted -= table.decision(held + 1, arriving, missing - 1).makespan_s
        assert table.gain_s(held, arriving, missing) == wanted
        assert gains[table.index(held, arriving, missing)] == max(0, int(wanted * 1e9))
    assert gains[table.index(8, 0, 0)] == 0
    assert max(gains) > 0, "an expert more in a slot must be worth something somewhere"


def test_entries_are_packed_in_fields() -> None:
    table = DecisionTable(make_scheduler("paper", {}), cost_of("rtx4090-cpu16", "deepseek-v2-lite"), 6)
    packed, mask = table.packed(), (1 << FIELD_BITS) - 1
    assert len(packed) == 7**3 and all(0 <= entry < 1 << 31 for entry in packed)
    for held, missing in ((0, 6), (2, 4), (6, 0)):
        entry, said = packed[table.index(held, 0, missing)], table.decision(held, 0, missing)
        assert [entry >> (FIELD_BITS * place) & mask for place in range(3)] == [said.transfers, said.left, 0]
        assert entry >> (3 * FIELD_BITS) == min(said.room, 127)


def test_room_is_what_the_link_brings_until_the_next_layer() -> None:
    cost = CostModel(cpu=lambda n: 4.0, gpu=lambda n: 1.0, link_bytes_per_s=1.0, expert_bytes=2, dense_s=1.0)
    table = DecisionTable(make_scheduler("static", {}), cost, 2)
    assert table.decision(1, 0, 1).room == 2, "4 s on the CPU and 1 s between layers, 2 s a transfer"
    assert table.decision(1, 1, 0).room == 1, "one is arriving: its 2 s and 1 s on the GPU, then 1 s"


def test_too_many_experts_are_refused() -> None:
    with pytest.raises(ConfigError, match="1 to 127 experts a token, not 200"):
        DecisionTable(make_scheduler("static", {}), cost_of("rtx4090-cpu16", "qwen3-30b-a3b"), 200)
