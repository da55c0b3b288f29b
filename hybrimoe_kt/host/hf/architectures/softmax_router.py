"""A router that ranks experts by softmax, a correction and groups: what Transformers has for sigmoid alone."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

__all__ = ["choose_by_softmax"]


def choose_by_softmax(router: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return logits `[num_tokens, num_experts]`, weights and ids `[num_tokens, top_k]` for states `[..., hidden]`.

    `router` has the attributes of Transformers' DeepSeek-V3: the correction ranks experts and never weights them, and
    a group is as good as its two best.
    """
    logits = functional.linear(hidden.reshape(-1, router.hidden_dim).float(), router.weight.float())
    scores = logits.softmax(dim=-1)
    ranked = scores + router.e_score_correction_bias
    if router.num_group > 1:
        grouped = ranked.unflatten(-1, (router.num_group, -1))
        best = grouped.topk(2, dim=-1).values.sum(dim=-1).topk(router.topk_group, dim=-1).indices
        kept = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter_(1, best, True)
        ranked = grouped.masked_fill(~kept[..., None], float("-inf")).flatten(-2)
    ids = ranked.topk(router.top_k, dim=-1, sorted=False).indices
    weights = scores.gather(-1, ids)
    if router.norm_topk_prob:
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(1e-20)
    return logits, weights * router.routed_scaling_factor, ids
