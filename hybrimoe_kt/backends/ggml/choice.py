"""How a router chooses experts from its logits, as data: found out by trial, then done within a graph."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from .building import Builder

__all__ = ["Choice", "choice_of", "choose", "chosen_in"]

_LEAST_SUM = 1e-20
_FINITE = 1e30


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """Scores by logit, a bias that ranks and does not weight, groups of which few are looked at, and weights."""

    top_k: int
    scores: str
    """"softmax" or "sigmoid"."""
    is_normalised: bool
    """Whether weights add up to `factor`."""
    factor: float = 1.0
    bias: torch.Tensor | None = None
    """float32 `[num_experts]`."""
    num_groups: int = 1
    num_best_groups: int = 1
    is_group_of_two: bool = True
    """Whether a group is as good as its two best experts, else as its best."""


def choose(choice: Choice, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and ids int64 `[tokens, top_k]` for logits float32 `[tokens, num_experts]`."""
    scores = logits.softmax(dim=-1) if choice.scores == "softmax" else logits.sigmoid()
    ranked = scores if choice.bias is None else scores + choice.bias
    if choice.num_groups > 1:
        grouped = ranked.unflatten(-1, (choice.num_groups, -1))
        of_group = grouped.topk(2, dim=-1).values.sum(dim=-1) if choice.is_group_of_two else grouped.amax(dim=-1)
        best = of_group.topk(choice.num_best_groups, dim=-1).indices
        kept = torch.zeros_like(of_group, dtype=torch.bool).scatter_(-1, best, True)
        ranked = grouped.masked_fill(~kept[..., None], -torch.inf).flatten(-2)
    ids = ranked.topk(choice.top_k, dim=-1).indices
    weights = scores.gather(-1, ids)
    if choice.is_normalised:
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(_LEAST_SUM)
    return weights * choice.factor, ids


def choice_of(
    logits: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    *,
    factor: float = 1.0,
    bias: torch.Tensor | None = None,
    num_groups: int = 1,
    num_best_groups: int = 1,
) -> Choice | None:
    """The choice by which a router gave `weights` and `ids` `[tokens, top_k]` for `logits [tokens, num_experts]`.

    The rest is what it says of itself. None if no choice known here does the same.
    """
    wanted = _spread(logits, weights, ids)
    for scores, is_normalised, is_group_of_two, tried_factor in itertools.product(
        ("softmax", "sigmoid"), (True, False), (True, False), (factor, 1.0)
    ):
        found = Choice(
            ids.shape[1], scores, is_normalised, tried_factor, bias, num_groups, num_best_groups, is_group_of_two
        )
        if torch.allclose(_spread(logits, *choose(found, logits.float())), wanted, rtol=1e-4, atol=1e-6):
            return found
    return None


def _spread(logits: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.zeros(logits.shape).scatter_(1, ids, weights.float())


def chosen_in(builder: Builder, choice: Choice, logits: int, num_experts: int, tokens: int) -> tuple[int, int] | None:
    """Add the choice to a graph: weights and ids int32 `[top_k, tokens]`, or None where groups come first.

    Ids are valid ones whatever the logits are, also of such that are not numbers.
    """
    if choice.num_groups > 1:
        return None
    if choice.scores == "softmax":
        scores = builder.softmax(logits, in_place=False)
    else:
        scores = builder.sigmoid(logits, in_place=False)
    if choice.bias is None:
        ranked = logits  # both functions keep their order
    else:
        ranked = builder.plus(scores, builder.constant(choice.bias, num_experts), in_place=False)
    ids = builder.largest(builder.clamped(ranked, -_FINITE, _FINITE, in_place=False), choice.top_k)
    weights = builder.picked(builder.reshape(scores, 1, num_experts, tokens), ids)
    weights = builder.reshape(weights, choice.top_k, tokens)
    if choice.is_normalised:
        sums = builder.clamped(builder.sums(weights), _LEAST_SUM, _FINITE)
        weights = builder.divided(weights, sums)
    return builder.scaled(weights, choice.factor), ids
