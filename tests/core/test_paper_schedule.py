"""The paper's greedy, step by step on hand-made costs (seconds are round numbers)."""

from __future__ import annotations

from hybrimoe_kt.core.cost import CostModel
from hybrimoe_kt.core.schedule import make_scheduler
from hybrimoe_kt.core.schedule.base import Task, evaluate

PAPER = make_scheduler("paper", {})


def cost(cpu: float = 2.0, gpu: float = 1.0, transfer: float = 3.0, call: float = 0.0) -> CostModel:
    """CPU: `cpu` per token; GPU: `gpu` whatever the load; one transfer: `transfer`."""
    return CostModel(
        cpu=lambda load: cpu * load,
        gpu=lambda load: gpu,
        cpu_call_s=call,
        link_bytes_per_s=1.0,
        expert_bytes=int(transfer),
    )


def test_gpu_takes_residents_by_falling_load() -> None:
    found = PAPER.assign(Task(cost(cpu=100), {3: 1, 5: 4, 7: 2}, [3, 5, 7], []))
    assert list(found.gpu) == [5, 7, 3]
    assert found.makespan_s == 3.0


def test_cpu_takes_missing_from_the_lowest_load_and_link_from_the_highest() -> None:
    found = PAPER.assign(Task(cost(cpu=2), {1: 1, 2: 2, 3: 3}, [], [1, 2, 3]))
    # CPU ends expert 1 at 2; the link ends expert 3 at 3; the GPU ends it at 4; the CPU ends expert 2 at 6, as the link
    assert list(found.cpu) == [1, 2]
    assert list(found.transfers) == [3]
    assert found.makespan_s == 6.0


def test_idle_cpu_takes_residents_from_the_lowest_load() -> None:
    found = PAPER.assign(Task(cost(cpu=1, gpu=2), {1: 1, 2: 2, 3: 5}, [1, 2, 3], []))
    # the CPU ends expert 1 at 1 and would end expert 2 at 3, before the GPU (busy with 3 until 2) could at 4
    assert list(found.cpu) == [1, 2]
    assert list(found.gpu) == [3]


def test_an_arriving_expert_joins_the_queue_by_load() -> None:
    found = PAPER.assign(Task(cost(cpu=100, gpu=2, transfer=1), {1: 1, 2: 2, 9: 50}, [1, 2], [9]))
    assert list(found.gpu) == [2, 9, 1]  # it lands at 1, while the GPU runs expert 2 until 2, and goes before 1
    assert found.makespan_s == 6.0


def test_transfers_queue_behind_the_backlog() -> None:
    busy = PAPER.assign(Task(cost(cpu=2), {1: 1, 2: 1}, [], [1, 2], link_busy_s=10.0))
    assert list(busy.cpu) == [2, 1]
    assert not busy.transfers


def test_shared_experts_hold_the_gpu_first() -> None:
    found = PAPER.assign(Task(cost(cpu=2), {1: 1, 2: 1}, [1, 2], [], shared_s=5.0))
    assert list(found.cpu) == [2, 1]
    assert evaluate(Task(cost(), {1: 1}, [1], [], shared_s=5.0), (), [1], ()).makespan_s == 6.0


def test_the_cpu_call_is_paid_once() -> None:
    model = cost(cpu=1, call=0.5)
    assert model.cpu_s([1, 1, 1]) == 3.5
    assert model.cpu_s([]) == 0.0


def test_a_transfer_waits_for_a_slot() -> None:
    model = cost(cpu=100, gpu=1, transfer=3)
    roomy = evaluate(Task(model, {1: 1, 2: 1}, [], [1, 2], num_free=2), (), [1, 2], [1, 2])
    tight = evaluate(Task(model, {1: 1, 2: 1}, [], [1, 2], num_free=1), (), [1, 2], [1, 2])
    assert roomy.makespan_s == 7.0
    assert tight.makespan_s == 8.0  # the second transfer starts when the first expert has left the GPU at 4


def test_contention_slows_the_cpu_while_the_link_is_busy() -> None:
    model = CostModel(cpu=lambda n: float(n), gpu=lambda n: 1.0, cpu_slowdown=2.0)
    assert model.cpu_end_s(1.0, 10.0) == 2.0
    assert model.cpu_end_s(3.0, 2.0) == 4.0  # half speed until 2, then the 2 seconds of work left
    assert model.cpu_end_s(3.0, 0.0) == 3.0
