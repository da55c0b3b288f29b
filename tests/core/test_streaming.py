"""A prompt's next layer comes through lent slots while this one computes: when it pays, and without a trace left."""

from __future__ import annotations

import random

import pytest

from hybrimoe_kt.core.coordinator import Coordinator
from hybrimoe_kt.core.cost import CostModel
from hybrimoe_kt.core.strategy import Strategy
from hybrimoe_kt.core.types import LayerSpec, Plan, Routing, Transfer

EXPERTS, TOP_K, SLOTS, LAYERS = 16, 4, 4, 4


def coordinator(num_buffer_slots: int, link_bytes_per_s: float = 1e9) -> Coordinator:
    """Experts of 1 MB: 1 ms on the link at 1 GB/s, 0.1 ms on the GPU, 1 ms per token on the CPU."""
    cost = CostModel(
        cpu=lambda load: 1e-3 * load,
        gpu=lambda load: 1e-4,
        link_bytes_per_s=link_bytes_per_s,
        expert_bytes=10**6,
        dense_s=8e-3,
    )
    specs = [
        LayerSpec(layer, EXPERTS, TOP_K, 10**6, SLOTS, num_buffer_slots=num_buffer_slots) for layer in range(LAYERS)
    ]
    made = Coordinator(specs, cost, Strategy(prefetch_size=1))
    made.initial_transfers()
    return made


def prompt(seed: int, layer: int, num_tokens: int = 24) -> Routing:
    draw = random.Random(f"{seed} {layer}")
    loads: dict[int, int] = {}
    for _ in range(num_tokens):
        for expert in draw.sample(range(EXPERTS), TOP_K):
            loads[expert] = loads.get(expert, 0) + 1
    return Routing(layer, loads, num_tokens)


def run(made: Coordinator, seed: int, num_tokens: int = 24) -> list[tuple[Plan, tuple[Transfer, ...]]]:
    found = []
    for layer in range(LAYERS):
        plan = made.plan(prompt(seed, layer, num_tokens))
        ahead = [prompt(seed, layer + 1, num_tokens)] if layer + 1 < LAYERS else []
        transfers = made.prefetch(plan, ahead).transfers
        found.append((plan, transfers))
        made.finish(plan)
        made.check_integrity()
    return found


def test_it_shortens_a_prompt() -> None:
    without, streaming = coordinator(0), coordinator(EXPERTS)
    for seed in range(3):
        run(without, seed)
        run(streaming, seed)
    assert streaming.stats.num_streamed > 0
    assert without.stats.num_streamed == 0
    assert streaming.now_s < 0.8 * without.now_s


def test_streamed_experts_use_lent_slots_and_the_plan_after_uses_them() -> None:
    made = coordinator(EXPERTS)
    (_, streamed), (plan, _) = run(made, 0)[:2]
    lent = [transfer for transfer in streamed if transfer.slot >= SLOTS]
    assert lent and all(transfer.expert.layer == 1 and transfer.evicted is None for transfer in lent)
    used = {transfer.expert.index for transfer in lent} & set(plan.gpu)
    assert len(used) >= len(lent) - 2, "at most the last to land are left to the CPU"
    assert all(plan.slots[transfer.expert.index] == transfer.slot for transfer in lent if transfer.expert.index in used)


def test_nothing_stays_lent() -> None:
    made = coordinator(EXPERTS)
    for seed in range(4):
        run(made, seed, num_tokens=24 if seed % 2 else 1)
        for layer in range(LAYERS):
            assert made._layers[layer].cache.num_slots == SLOTS


@pytest.mark.parametrize("num_buffer_slots", [1, 3, EXPERTS])
def test_never_more_than_was_lent(num_buffer_slots: int) -> None:
    for _, transfers in run(coordinator(num_buffer_slots), 1):
        slots = [transfer.slot for transfer in transfers if transfer.slot >= SLOTS]
        assert len(set(slots)) == len(slots) <= num_buffer_slots


def test_a_slow_link_streams_nothing() -> None:
    made = coordinator(EXPERTS, link_bytes_per_s=1e6)
    run(made, 0)
    assert made.stats.num_streamed == 0


def test_decode_streams_nothing() -> None:
    made = coordinator(EXPERTS)
    run(made, 0, num_tokens=1)
    assert made.stats.num_streamed == 0
