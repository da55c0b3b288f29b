"""Reference of a router's choice."""

from __future__ import annotations

import torch

from hybrimoe_kt.kernels.row_forms import Ranking

__all__ = ["naive_choose_experts"]


def naive_choose_experts(
    logits: torch.Tensor, ranking: Ranking, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return weights float32 and ids int64 `[..., K]`, best first, and the softmax float32 of `logits [..., E]`.

    `bias` float32 `[E]` ranks and does not weight. Of equals the lowest id comes first; what is no number comes last.
    """
    logits = logits.float()
    probabilities = logits.softmax(dim=-1)
    scores = logits.sigmoid() if ranking.is_sigmoid else probabilities
    ranked = scores if bias is None else scores + bias
    ranked = ranked.nan_to_num(nan=-1e30).clamp(-1e30, 1e30)
    if ranking.num_groups > 1:
        grouped = ranked.unflatten(-1, (ranking.num_groups, -1))
        best_two = grouped.topk(2, dim=-1).values
        of_group = best_two.sum(dim=-1) if ranking.is_group_of_two else best_two[..., 0]
        best = of_group.sort(dim=-1, descending=True, stable=True).indices[..., : ranking.num_best_groups]
        kept = torch.zeros_like(of_group, dtype=torch.bool).scatter_(-1, best, True)
        ranked = grouped.masked_fill(~kept[..., None], -3e38).flatten(-2)
    ids = ranked.sort(dim=-1, descending=True, stable=True).indices[..., : ranking.top_k]
    weights = scores.gather(-1, ids)
    if ranking.is_normalised:
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(ranking.least)
    return (weights * ranking.factor).to(ranking.rounded_to).float(), ids, probabilities
