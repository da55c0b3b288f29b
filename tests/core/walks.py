"""Random routings and a driver that calls a coordinator as a host does."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from hybrimoe_kt.core.coordinator import Coordinator
from hybrimoe_kt.core.strategy import Strategy
from hybrimoe_kt.core.types import LayerSpec, Plan, Routing, Transfer
from tests.core.instances import cost_of, routed_loads

MODEL, EXPERT_BYTES = "qwen3-30b-a3b", 2_860_000


def make_coordinator(num_slots: int, layers: int = 3, num_experts: int = 16, **options: Any) -> Coordinator:
    """Return a coordinator of small layers with the costs of a real model on a desktop."""
    cost = cost_of(options.pop("profile", "default"), MODEL)
    specs = [LayerSpec(layer, num_experts, 4, EXPERT_BYTES, num_slots) for layer in range(layers)]
    frequencies = options.pop("frequencies", None)
    return Coordinator(specs, cost, Strategy(**options), frequencies=frequencies)


def walk(seed: int, steps: int, layers: int = 3, num_experts: int = 16, top_k: int = 4) -> list[Routing]:
    """Return a prompt of several tokens, then single tokens."""
    rng = random.Random(seed)
    result = []
    for step in range(steps):
        num_tokens = 24 if step == 0 else 1
        for layer in range(layers):
            loads = routed_loads(random.Random(seed + layer), num_experts, top_k, num_tokens)
            if step:
                favourite = sorted(loads)
                loads = {e: 1 for e in favourite if rng.random() < 0.6}
                while len(loads) < top_k:
                    loads[rng.randrange(num_experts)] = 1
            weights = {e: float(load) for e, load in loads.items()}
            result.append(Routing(layer, loads, num_tokens, None, weights))
    return result


def drive(
    coordinator: Coordinator, routings: Sequence[Routing], *, look_ahead: int = 0
) -> Iterator[tuple[Routing, Plan, tuple[Transfer, ...], tuple[Transfer, ...]]]:
    """Yield routing, plan, prefetches and aborts while each plan is open; the next routings are the look-ahead."""
    late: tuple[Transfer, ...] = ()
    for position, routing in enumerate(routings):
        plan = coordinator.plan(routing)
        ahead = coordinator.prefetch(plan, routings[position + 1 : position + 1 + look_ahead])
        yield routing, plan, ahead.transfers, (*late, *plan.dropped, *ahead.dropped)
        late = coordinator.finish(plan).dropped
