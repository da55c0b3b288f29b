"""From the tensors of a step to the plain numbers that decisions are made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain

import torch

from hybrimoe_kt.core.types import Phase, Routing
from hybrimoe_kt.device.readback import Guesses, Step

__all__ = ["loads_of", "mean_probabilities", "predicted_routing", "routing_of"]


def loads_of(ids: torch.Tensor) -> dict[int, int]:
    """Expert -> tokens routed to it, in the order first met; `ids` `[num_tokens, top_k]` on the host."""
    if len(ids) == 1:  # one token names an expert once
        return dict.fromkeys(ids.tolist()[0], 1)
    loads: dict[int, int] = {}
    for row in ids.tolist():
        for expert in row:
            loads[expert] = loads.get(expert, 0) + 1
    return loads


def routing_of(layer: int, step: Step, phase: Phase | None) -> Routing:
    """Turn a step's tensors into plain numbers."""
    ids, weights = step.host.ids, step.host.weights
    if ids.shape[0] == 1:  # one token names an expert once
        chosen = ids.tolist()[0]
        shares = dict(zip(chosen, weights.tolist()[0], strict=True))
        return Routing(layer, dict.fromkeys(chosen, 1), 1, step.scores, shares, phase)
    flat = ids.flatten().tolist()
    summed = dict.fromkeys(flat, 0.0)
    for index, weight in zip(flat, weights.flatten().tolist(), strict=True):
        summed[index] += weight
    return Routing(layer, dict(Counter(flat)), len(ids), step.scores, summed, phase)


def predicted_routing(guesses: Guesses, rows: Sequence[Sequence[float]], phase: Phase | None = None) -> list[Routing]:
    """The gates' guesses in plain numbers, `rows` their scores by layer, which stay where they are."""
    num_tokens = guesses.ids.shape[1]
    routings = []
    for later, chosen, row in zip(guesses.layers, guesses.ids.tolist(), rows, strict=True):
        # one token names an expert once
        loads = dict.fromkeys(chosen[0], 1) if num_tokens == 1 else dict(Counter(chain.from_iterable(chosen)))
        routings.append(Routing(later, loads, num_tokens, row, None, phase))
    return routings


def mean_probabilities(logits: torch.Tensor, probabilities: torch.Tensor | None = None) -> torch.Tensor:
    """The router's probabilities averaged over the tokens, float32 `[num_experts]`; computed where not known."""
    if probabilities is not None:
        return probabilities[0] if len(probabilities) == 1 else probabilities.mean(dim=0)
    if logits.shape[0] == 1:
        return torch.softmax(logits[0], dim=-1, dtype=torch.float32)
    return torch.softmax(logits.float(), dim=-1).mean(dim=0)
