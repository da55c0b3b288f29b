"""From the tensors of a step to the plain numbers that decisions are made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hybrimoe_kt.core.types import Routing
from hybrimoe_kt.device.inbox import Guesses

__all__ = ["mean_probabilities", "predicted_routing", "routing_of"]


def routing_of(layer: int, ids: torch.Tensor, weights: torch.Tensor | None, scores: Sequence[float] | None) -> Routing:
    """Turn a step's tensors (`[num_tokens, top_k]`, scores `[num_experts]`) into plain numbers."""
    num_tokens = ids.shape[0]
    if num_tokens == 1:  # one token names an expert once
        chosen = ids.tolist()[0]
        shares = None if weights is None else dict(zip(chosen, weights.tolist()[0], strict=True))
        return Routing(layer, dict.fromkeys(chosen, 1), 1, scores, shares)
    flat = ids.flatten().tolist()
    loads: dict[int, int] = {}
    for index in flat:
        loads[index] = loads.get(index, 0) + 1
    summed: dict[int, float] | None = None
    if weights is not None:
        summed = dict.fromkeys(loads, 0.0)
        for index, weight in zip(flat, weights.flatten().tolist(), strict=True):
            summed[index] += weight
    return Routing(layer, loads, num_tokens, scores, summed)


def predicted_routing(guesses: Guesses, scores: torch.Tensor) -> list[Routing]:
    """The gates' guesses in plain numbers; `scores` float32 `[num_layers, num_experts]`.

    Few of them are ever looked at, so they stay packed: a memoryview gives them out as Python's own numbers.
    """
    if guesses.ids.shape[1] > 1:
        rows = scores.tolist()
        return [routing_of(later, guesses.ids[at], None, rows[at]) for at, later in enumerate(guesses.layers)]
    packed, size = memoryview(scores.numpy().tobytes()).cast("f"), scores.shape[1]
    routings, at = [], 0
    for later, chosen in zip(guesses.layers, guesses.ids.tolist(), strict=True):
        routings.append(Routing(later, dict.fromkeys(chosen[0], 1), 1, packed[at : at + size]))
        at += size
    return routings


def mean_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """The router's probabilities averaged over the tokens, float32 `[num_experts]`."""
    if logits.shape[0] == 1:
        return torch.softmax(logits[0], dim=-1, dtype=torch.float32)
    return torch.softmax(logits.float(), dim=-1).mean(dim=0)
