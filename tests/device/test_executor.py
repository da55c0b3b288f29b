"""What the executor does with a plan: who computes never matters, and nothing is computed with the wrong expert."""

from __future__ import annotations

import pytest
import torch

from hybrimoe_kt.backends.gpu_torch import TorchReferenceGpu
from hybrimoe_kt.backends.torch_reference import TorchReferenceCpu
from hybrimoe_kt.core.types import ExpertId, Plan, Transfer
from hybrimoe_kt.device.backend import Routed
from hybrimoe_kt.device.choose import choose_accelerator
from hybrimoe_kt.device.executor import Executor
from hybrimoe_kt.device.host_store import HostStore
from hybrimoe_kt.device.lane import Lane
from hybrimoe_kt.device.waiting import Deadline
from hybrimoe_kt.errors import DeadlineError, KernelError

from .machine import EXPERTS, HIDDEN, TOP_K, Inputs, layers, wanted

EVERYONE = tuple(range(EXPERTS))


@pytest.fixture
def store() -> HostStore:
    made = HostStore()
    for experts in layers():
        made.add(experts)
    return made


def executor(store: HostStore, num_slots: int = 2, cpu: object = None) -> Executor:
    backend = cpu or TorchReferenceCpu()
    for experts in store.layers.values():
        backend.add_layer(experts)
    accelerator = choose_accelerator("emulated")
    assert accelerator is not None
    deadline = Deadline(0.2)
    slots = dict.fromkeys(store.layers, num_slots)
    lane = Lane(
        accelerator, TorchReferenceGpu(), store, slots,
        max_tokens=8, cpu_answers_pairs=True, chunk_bytes=4096, deadline=deadline,
    )  # fmt: skip
    return Executor(backend, [lane], deadline)


def inputs(num_tokens: int = 6, seed: int = 3) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(num_tokens, EXPERTS, generator=generator).argsort(dim=1)[:, :TOP_K]
    return torch.randn(num_tokens, HIDDEN, generator=generator), ids, torch.rand(num_tokens, TOP_K, generator=generator)


def bring(index: int, slot: int, layer: int = 1) -> Transfer:
    return Transfer(ExpertId(layer, index), slot, 0)


def execute(run: Executor, plan: Plan, residents: dict[int, int], step_inputs: Inputs) -> torch.Tensor:
    for index, slot in residents.items():
        run.fill(bring(index, slot))
    step = run.lane_of[plan.layer].read(Routed(*step_inputs))
    run.start(plan, step)
    return run.join(plan, step)


@pytest.mark.parametrize(
    ("plan", "residents"),
    [
        (Plan(1, cpu=EVERYONE), {}),
        (Plan(1, cpu=EVERYONE[2:], gpu=(0, 1), slots={0: 1, 1: 0}), {0: 1, 1: 0}),
        (Plan(1, cpu=EVERYONE[1:], gpu=(0,), slots={0: 0}, transfers=(bring(0, 0),)), {}),
        (
            Plan(1, cpu=EVERYONE[2:], gpu=(1, 0), slots={0: 0, 1: 1}, transfers=(bring(0, 0),)),
            {1: 1},
        ),
        (
            Plan(
                1,
                cpu=(),
                gpu=EVERYONE,
                slots=dict.fromkeys(EVERYONE, 0),
                transfers=tuple(bring(index, 0) for index in EVERYONE),
            ),
            {},
        ),
    ],
    ids=["cpu", "resident", "arriving", "both", "all through one slot"],
)
def test_every_split_of_the_work_gives_the_same_bits(store: HostStore, plan: Plan, residents: dict[int, int]) -> None:
    for num_tokens in (1, 6):
        given = inputs(num_tokens)
        assert torch.equal(execute(executor(store), plan, residents, given), wanted(1, given))


def test_a_wrong_slot_shows(store: HostStore) -> None:
    """The equality above would notice: here expert 0's slot holds expert 7."""
    plan = Plan(1, cpu=EVERYONE[1:], gpu=(0,), slots={0: 0})
    given = inputs()
    assert not torch.allclose(execute(executor(store), plan, {7: 0}, given), wanted(1, given))


def test_a_slot_given_away_is_not_filled_by_an_old_prefetch(store: HostStore) -> None:
    """A prefetch that still waits for the link must not overwrite the expert that took its slot meanwhile."""
    run = executor(store)
    run.prefetch([bring(3, 0)])
    run.fill(bring(5, 0))
    run.feed_links()
    plan = Plan(1, cpu=tuple(e for e in EVERYONE if e != 5), gpu=(5,), slots={5: 0})
    given = inputs()
    assert torch.equal(execute(run, plan, {}, given), wanted(1, given))


def test_a_prefetch_that_waits_is_sent_when_its_plan_comes(store: HostStore) -> None:
    run = executor(store)
    run.prefetch([bring(3, 0)])
    assert len(run.lanes[0].queue.waiting) == 1
    plan = Plan(1, cpu=tuple(e for e in EVERYONE if e != 3), gpu=(3,), slots={3: 0})
    given = inputs()
    assert torch.equal(execute(run, plan, {}, given), wanted(1, given))


def test_an_aborted_prefetch_is_not_sent(store: HostStore) -> None:
    run = executor(store)
    run.prefetch([bring(3, 0), bring(4, 1)])
    run.heed([bring(3, 0)], [])
    assert len(run.lanes[0].queue.waiting) == 1


class _DeadWorker(TorchReferenceCpu):
    def is_done(self) -> bool:
        return False


def test_a_dead_worker_is_an_error_and_not_a_hang(store: HostStore) -> None:
    run = executor(store, cpu=_DeadWorker())
    plan, given = Plan(1, cpu=EVERYONE), inputs()
    with pytest.raises(DeadlineError, match=r"CPU experts' worker \(torch_reference\) did not end within 0.2 s"):
        execute(run, plan, {}, given)
    with pytest.raises(KernelError, match="has not come back; restart the program"):
        execute(run, plan, {}, given)
