"""Softmax or sigmoid, groups, top-k and weights in one launch: a token's logits stay in one program's registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hybrimoe_kt.kernels.row_configs import ChooseConfig, power_of_two
from hybrimoe_kt.kernels.row_forms import Ranking

__all__ = ["choose_experts", "choose_experts_kernel"]

_ROUNDED = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@triton.jit
def choose_experts_kernel(
    logits,
    bias,
    num_experts,
    rows_per_bias,
    least,
    factor,
    weights,
    ids,
    probabilities,
    SIGMOID: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    BEST_GROUPS: tl.constexpr,
    OF_TWO: tl.constexpr,
    NORMALISES: tl.constexpr,
    ROUNDED: tl.constexpr,
    WEIGHS: tl.constexpr,
    TOP_K: tl.constexpr,
    PLACES: tl.constexpr,
    GROUPS: tl.constexpr,
    MEMBERS: tl.constexpr,
):
    """Program (token). Experts are `[GROUPS, MEMBERS]`, each a power of two, until groups have been chosen."""
    row = tl.program_id(0).to(tl.int64)
    lowest: tl.constexpr = -3.4e38
    nowhere: tl.constexpr = 1 << 30
    group = tl.arange(0, GROUPS)  # [GROUPS]
    member = tl.arange(0, MEMBERS)  # [MEMBERS]
    per_group = num_experts // NUM_GROUPS
    expert = group[:, None] * per_group + member[None, :]
    live = (group < NUM_GROUPS)[:, None] & (member < per_group)[None, :]
    given = tl.load(logits + row * num_experts + expert, mask=live, other=0.0).to(tl.float32)
    highest = tl.max(tl.max(tl.where(live, given, lowest), axis=1), axis=0)
    powers = tl.where(live, tl.exp(given - highest), 0.0)
    shares = powers / tl.sum(tl.sum(powers, axis=1), axis=0)
    tl.store(probabilities + row * num_experts + expert, shares, mask=live)
    scores = 1.0 / (1.0 + tl.exp(-given)) if SIGMOID else shares
    ranked = scores
    if HAS_BIAS:
        ranked += tl.load(bias + row // rows_per_bias * num_experts + expert, mask=live, other=0.0)
    # Whatever the logits are, valid experts are chosen: also of such that are no numbers.
    ranked = tl.minimum(tl.maximum(tl.where(ranked == ranked, ranked, -1e30), -1e30), 1e30)
    ranked = tl.where(live, ranked, lowest)
    if NUM_GROUPS > 1:
        best = tl.max(ranked, axis=1)  # [GROUPS]
        if OF_TWO:
            first = tl.min(tl.where(ranked == best[:, None], member[None, :], nowhere), axis=1)
            best += tl.max(tl.where(member[None, :] == first[:, None], lowest, ranked), axis=1)
        best = tl.where(group < NUM_GROUPS, best, lowest)
        kept = group < 0
        for _ in tl.static_range(BEST_GROUPS):
            found = tl.min(tl.where(best == tl.max(best, axis=0), group, nowhere), axis=0)
            kept = kept | (group == found)
            best = tl.where(group == found, lowest, best)
        ranked = tl.where(live & (kept[:, None] == 0), -3e38, ranked)
    ranked = tl.reshape(ranked, [GROUPS * MEMBERS])
    scores = tl.reshape(scores, [GROUPS * MEMBERS])
    expert = tl.reshape(tl.where(live, expert, nowhere), [GROUPS * MEMBERS])
    place = tl.arange(0, PLACES)  # [PLACES]
    chosen = tl.zeros([PLACES], tl.int32)
    values = tl.zeros([PLACES], tl.float32)
    for number in tl.static_range(TOP_K):
        found = tl.min(tl.where(ranked == tl.max(ranked, axis=0), expert, nowhere), axis=0)
        chosen = tl.where(place == number, found, chosen)
        if WEIGHS:
            values = tl.where(place == number, tl.sum(tl.where(expert == found, scores, 0.0), axis=0), values)
        ranked = tl.where(expert == found, lowest, ranked)
    taken = place < TOP_K
    tl.store(ids + row * TOP_K + place, chosen.to(tl.int64), mask=taken)
    if WEIGHS:
        if NORMALISES:
            values = values / tl.maximum(tl.sum(values, axis=0), least)
        values = values * factor
        if ROUNDED == 1:
            values = values.to(tl.float16).to(tl.float32)
        elif ROUNDED == 2:
            values = values.to(tl.bfloat16).to(tl.float32)
        tl.store(weights + row * TOP_K + place, values, mask=taken)


def choose_experts(
    logits: torch.Tensor,
    ranking: Ranking,
    bias: torch.Tensor | None,
    weights: torch.Tensor | None,
    ids: torch.Tensor,
    probabilities: torch.Tensor,
    config: ChooseConfig,
) -> None:
    """Write weights float32 and ids int64 `[N, K]` and the softmax float32 `[N, E]` of `logits [N, E]`, any float.

    `bias` float32 `[E]`, or `[L, E]` for as many rows each. All contiguous; without `weights` only ids are wanted.
    """
    num_rows, num_experts = logits.shape
    groups = power_of_two(ranking.num_groups)
    choose_experts_kernel[(num_rows,)](
        logits,
        logits if bias is None else bias,
        num_experts,
        1 if bias is None else num_rows * num_experts // bias.numel(),
        ranking.least,
        ranking.factor,
        probabilities if weights is None else weights,
        ids,
        probabilities,
        SIGMOID=ranking.is_sigmoid,
        HAS_BIAS=bias is not None,
        NUM_GROUPS=ranking.num_groups,
        BEST_GROUPS=ranking.num_best_groups,
        OF_TWO=ranking.is_group_of_two,
        NORMALISES=ranking.is_normalised,
        ROUNDED=_ROUNDED[ranking.rounded_to],
        WEIGHS=weights is not None,
        TOP_K=ranking.top_k,
        PLACES=power_of_two(ranking.top_k),
        GROUPS=groups,
        MEMBERS=power_of_two(num_experts // ranking.num_groups),
        num_warps=config.num_warps,
    )
