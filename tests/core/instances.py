"""Random scheduling problems in the ranges of the built-in profiles and the paper's models."""

from __future__ import annotations

import random
from functools import cache

from hybrimoe_kt.core.cost import CostModel
from hybrimoe_kt.core.schedule.base import Task
from hybrimoe_kt.profiles import builtin_profiles, load_profile

# model -> (experts, top-k, int4 bytes of an expert, multiply-accumulates per token)
MODELS = {
    "mixtral-8x7b": (8, 2, 88_000_000, 3 * 4096 * 14336),
    "qwen2-57b-a14b": (64, 8, 13_800_000, 3 * 3584 * 2560),
    "deepseek-v2-lite": (64, 6, 4_330_000, 3 * 2048 * 1408),
    "qwen3-30b-a3b": (128, 8, 2_860_000, 3 * 2048 * 768),
}
GPU_PROFILES = tuple(name for name in builtin_profiles() if load_profile(name).has_gpu)


@cache
def cost_of(profile: str, model: str) -> CostModel:
    """Return the cost model of one model on one machine."""
    _, _, num_bytes, macs = MODELS[model]
    return CostModel.from_profile(load_profile(profile), expert_bytes=num_bytes, expert_macs=macs)


def routed_loads(rng: random.Random, num_experts: int, top_k: int, num_tokens: int) -> dict[int, int]:
    """Return skewed loads: every token picks `top_k` experts by weight, without repetition."""
    popularity = [rng.random() ** 2 + 0.02 for _ in range(num_experts)]
    loads: dict[int, int] = {}
    for _ in range(num_tokens):
        ranked = sorted(range(num_experts), key=lambda e: rng.random() ** (1.0 / popularity[e]), reverse=True)
        for expert in ranked[:top_k]:
            loads[expert] = loads.get(expert, 0) + 1
    return loads


def random_task(
    rng: random.Random,
    *,
    max_experts: int,
    max_tokens: int = 64,
    with_pending: bool = True,
    with_contention: bool = True,
    limited_slots: bool = False,
) -> Task:
    """Return a task of at most `max_experts` routed experts on a random profile and model."""
    while True:
        profile, model = rng.choice(GPU_PROFILES), rng.choice(list(MODELS))
        cost = cost_of(profile, model)
        if cost.cpu_slowdown != 1.0 and not with_contention:
            continue
        num_experts, top_k, _, _ = MODELS[model]
        num_tokens = rng.choice([1, 1, 2, 3, 4, 8, 16, 32, 64, 128, 512, 1024])
        if num_tokens > max_tokens:
            continue
        loads = _loads(rng, num_experts, top_k, num_tokens)
        if len(loads) <= max_experts:
            break
    share = rng.random()
    held = [e for e in loads if rng.random() < share]
    missing = [e for e in loads if e not in held]
    link_busy_s = rng.choice([0.0, 0.0, rng.random() * 3 * cost.expert_transfer_s])
    arrival_s = {}
    if with_pending and held and link_busy_s and rng.random() < 0.5:
        for position, expert in enumerate(rng.sample(held, min(len(held), 2))):
            arrival_s[expert] = max(0.0, link_busy_s - position * cost.expert_transfer_s)
    return Task(
        cost,
        loads,
        held,
        missing,
        arrival_s=arrival_s,
        link_busy_s=link_busy_s,
        shared_s=rng.choice([0.0, rng.random() * 4 * cost.gpu_s(1)]),
        num_free=rng.randint(0, len(missing)) if limited_slots else 1 << 30,
    )


def _loads(rng: random.Random, num_experts: int, top_k: int, num_tokens: int) -> dict[int, int]:
    """Draw many tokens' loads at once: multinomial by popularity, at most one use per token."""
    if num_tokens <= 16:
        return routed_loads(rng, num_experts, top_k, num_tokens)
    popularity = [rng.random() ** 2 + 0.02 for _ in range(num_experts)]
    scale = num_tokens * top_k / sum(popularity)
    drawn = {e: min(num_tokens, int(p * scale * (0.7 + 0.6 * rng.random()))) for e, p in enumerate(popularity)}
    return {e: load for e, load in drawn.items() if load}
