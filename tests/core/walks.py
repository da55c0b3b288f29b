"""Random routings and a driver that calls a coordinator as a host does."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from hybrimoe_kt.core.coordinator import Coordinator
from hybrimoe_kt.core.types import LayerSpec, Plan, Routing, Transfer
from tests.core.instances import cost_of, routed_loads

MODEL, EXPERT_BYTES = "qwen3-30b-a3b", 2_860_000


def make_coordinator(num_slots: int, layers: int = 3, num_experts: int = 16, **options: Any) -> Coordinator:
    """Return a coordinator of small layers with the costs of a real model on a desktop."""
    cost = cost_of(options.pop("profile", "default"), MODEL)
    specs = [LayerSpec(layer, num_experts, 4, EXPERT_BYTES, num_slots) for layer in range(layers)]
    return Coordinator(specs, cost, **options)


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


class Orders(NamedTuple):
    """All that one call of the coordinator tells a host to do, in the order in which it is to be done."""

    plan: Plan | None = None
    aborted: tuple[Transfer, ...] = ()
    """Prefetches of earlier calls that need not be made any more."""
    closed: tuple[int, ...] = ()
    """Layers whose lent slots are gone."""
    transfers: tuple[Transfer, ...] = ()


def plan(coordinator: Coordinator, routing: Routing) -> Orders:
    """Plan a step; its transfers are in `transfers` too."""
    made = coordinator.plan(routing)
    return Orders(made, coordinator.take_aborted(), coordinator.take_closed(), made.transfers)


def prefetch(coordinator: Coordinator, layer: int, predictions: Sequence[Routing] = ()) -> Orders:
    """Choose what to bring ahead of need."""
    transfers = coordinator.prefetch(layer, predictions)
    return Orders(aborted=coordinator.take_aborted(), transfers=transfers)


def finish(coordinator: Coordinator, made: Plan) -> Orders:
    """End a step."""
    coordinator.finish(made)
    return Orders(aborted=coordinator.take_aborted(), closed=coordinator.take_closed())


def drive(
    coordinator: Coordinator, routings: Sequence[Routing], *, look_ahead: int = 0
) -> Iterator[tuple[Routing, Plan, tuple[Transfer, ...], tuple[Transfer, ...]]]:
    """Yield routing, plan, prefetches and aborts while each plan is open; the next routings are the look-ahead."""
    for position, routing in enumerate(routings):
        planned = plan(coordinator, routing)
        assert planned.plan is not None
        ahead = prefetch(coordinator, routing.layer, routings[position + 1 : position + 1 + look_ahead])
        yield routing, planned.plan, ahead.transfers, planned.aborted + ahead.aborted
        finish(coordinator, planned.plan)
