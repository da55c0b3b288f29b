"""From the tensors of a step to the plain numbers that decisions are made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain

import torch

from hybrimoe_kt.core.types import Phase, Routing
from hybrimoe_kt.device.readback import Guesses, Step

__all__ = ["loads_of", "mean_probabilities", "predicted_routing", "routing_of"]

_ELSEWHERE = -1
"""Id of a pair that another rank of an engine computes."""


def loads_of(ids: torch.Tensor) -> dict[int, int]:
    """Expert -> tokens routed to it, in the order first met; `ids` `[num_tokens, top_k]` on the host.

    Pairs that are another rank's, of id -1, are nobody's load here.
    """
    loads: dict[int, int]
    if len(ids) == 1:  # one token names an expert once
        loads = dict.fromkeys(ids.tolist()[0], 1)
    else:
        loads = {}
        for row in ids.tolist():
            for expert in row:
                loads[expert] = loads.get(expert, 0) + 1
    loads.pop(_ELSEWHERE, None)
    return loads


def routing_of(layer: int, step: Step, phase: Phase | None) -> Routing:
    """Turn a step's tensors into plain numbers; pairs of id -1 are another rank's, and left out."""
    ids, weights = step.host.ids, step.host.weights
    if ids.shape[0] == 1:  # one token names an expert once
        chosen = ids.tolist()[0]
        loads, shares = dict.fromkeys(chosen, 1), dict(zip(chosen, weights.tolist()[0], strict=True))
    else:
        flat = ids.flatten().tolist()
        loads, shares = dict(Counter(flat)), dict.fromkeys(flat, 0.0)
        for index, weight in zip(flat, weights.flatten().tolist(), strict=True):
            shares[index] += weight
    if _ELSEWHERE in loads:
        del loads[_ELSEWHERE], shares[_ELSEWHERE]
    return Routing(layer, loads, len(ids), step.scores, shares, phase)


def predicted_routing(guesses: Guesses, rows: Sequence[Sequence[float]], phase: Phase | None = None) -> list[Routing]:
    """The gates' guesses in plain numbers, `rows` their scores by layer, which stay where they are."""
    num_tokens = guesses.ids.shape[1]
    routings = []
    for later, chosen, row in zip(guesses.layers, guesses.ids.tolist(), rows, strict=True):
        # one token names an expert once
        loads = dict.fromkeys(chosen[0], 1) if num_tokens == 1 else dict(Counter(chain.from_iterable(chosen)))
        loads.pop(_ELSEWHERE, None)
        routings.append(Routing(later, loads, num_tokens, row, None, phase))
    return routings


def mean_probabilities(logits: torch.Tensor, probabilities: torch.Tensor | None = None) -> torch.Tensor:
    """The router's probabilities averaged over the tokens, float32 `[num_experts]`; computed where not known."""
    if probabilities is not None:
        return probabilities[0] if len(probabilities) == 1 else probabilities.mean(dim=0)
    if logits.shape[0] == 1:
        return torch.softmax(logits[0], dim=-1, dtype=torch.float32)
    return torch.softmax(logits.float(), dim=-1).mean(dim=0)
