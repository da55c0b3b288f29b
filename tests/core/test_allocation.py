"""Which slots transfers take when a plan brings more experts than slots can be had at once."""

from __future__ import annotations

import random

import pytest

from hybrimoe_kt.core.allocation import allocate
from hybrimoe_kt.core.cost import CostModel
from hybrimoe_kt.core.layer_state import LayerState
from hybrimoe_kt.core.link import Link
from hybrimoe_kt.core.policies.baselines import StaticFrequencyPolicy
from hybrimoe_kt.core.schedule.base import Assignment
from hybrimoe_kt.core.types import LayerSpec

EXPERTS, SLOTS, GPU_S, LINK_S = 12, 4, 1e-6, 1e-3


def make_state(worth: list[float]) -> LayerState:
    """Experts 0 to 3 stand in slots 0 to 3; the GPU is a thousand times as quick as the link."""
    cost = CostModel(
        cpu=lambda load: 1.0, gpu=lambda load: GPU_S * load, link_bytes_per_s=1e6 / LINK_S, expert_bytes=10**6
    )
    spec = LayerSpec(0, EXPERTS, 2, 10**6, SLOTS)
    state = LayerState(spec, cost, StaticFrequencyPolicy(spec, frequencies={0: worth}), Link())
    for expert in range(SLOTS):
        state.cache.prepare(expert, expert, 0.0)
        state.cache.complete(expert)
    return state


@pytest.mark.parametrize("seed", range(20))
def test_the_least_valuable_of_the_idle_slots_is_handed_on(seed: int) -> None:
    """Idle is every expert that the GPU is through with, but for the one that the link has only just brought."""
    draw = random.Random(seed)
    worth = [draw.random() for _ in range(EXPERTS)]
    state = make_state(worth)
    resident, arriving = draw.sample(range(SLOTS), SLOTS), draw.sample(range(SLOTS, EXPERTS), EXPERTS - SLOTS)
    task = state.task(dict.fromkeys(range(EXPERTS), 1), 1, 0.0, 0.0)
    transfers, slots = allocate(state, task, Assignment([], [*resident, *arriving], arriving, 0.0, 0.0, 0.0, 0.0), 0.0)
    holds = dict(enumerate(range(SLOTS)))
    just_brought = -1
    for number, transfer in enumerate(transfers):
        assert transfer.evicted is not None and transfer.evicted.index == holds[transfer.slot]
        idle = [e for e in holds.values() if e != just_brought]
        if number:  # the first cannot wait for all of them, and takes the first to be idle
            assert transfer.evicted.index == min(idle, key=worth.__getitem__)
        holds[transfer.slot] = just_brought = transfer.expert.index
        assert slots[transfer.expert.index] == transfer.slot
    assert [transfer.expert.index for transfer in transfers] == arriving
    state.cache.check_integrity()
