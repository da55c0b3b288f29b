"""Divides one budget of slots over the layers by what each slot would catch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from heapq import heapify, heappop, heapreplace

from hybrimoe_kt.errors import ConfigError

from .types import LayerSpec


def share_slots(
    specs: Sequence[LayerSpec], budget_bytes: int, frequencies: Mapping[int, Sequence[float]], *, least: int = 1
) -> dict[int, int]:
    """Return layer -> number of slots within `budget_bytes`, each slot where it catches most routings per byte.

    `frequencies` maps layer -> measured use of each expert. A layer's n-th slot is worth the use of its n-th
    most used expert, so taking the best next slot is optimal up to the last one that fits. Every layer gets
    `least` slots first (its top-k at most).
    """
    num_slots = {spec.layer: min(least, spec.top_k) for spec in specs}
    left = budget_bytes - sum(num_slots[spec.layer] * spec.expert_bytes for spec in specs)
    if left < 0:
        raise ConfigError(f"{budget_bytes} bytes of slots cannot give each of {len(specs)} layers {least}; give more")
    by_layer = {spec.layer: spec for spec in specs}
    ranked = {layer: sorted(frequencies[layer], reverse=True) for layer in by_layer}

    def entry(layer: int) -> tuple[float, int, int]:
        position, spec = num_slots[layer], by_layer[layer]
        worth = ranked[layer][position] / spec.expert_bytes if position < spec.num_experts else -1.0
        return -worth, position, layer

    queue = [entry(layer) for layer in by_layer]
    heapify(queue)
    while queue and queue[0][0] <= 0.0:
        layer = queue[0][2]
        if by_layer[layer].expert_bytes > left:
            heappop(queue)
            continue
        left -= by_layer[layer].expert_bytes
        num_slots[layer] += 1
        heapreplace(queue, entry(layer))
    return num_slots
