"""The lower bound is one: exhaustive search finds no better, and no replay beats it."""

from __future__ import annotations

from itertools import combinations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrimoe_kt.sim.bound import lower_bound, most_kept
from hybrimoe_kt.sim.scenario import METHODS, synthetic


def exhaustive(uses: list[list[int]], num_slots: int) -> int:
    """Try every content of the slots before every step: an expert may stay, or enter when it was just used."""
    experts = sorted({expert for step in uses for expert in step})
    contents = [frozenset(c) for size in range(num_slots + 1) for c in combinations(experts, size)]
    best = dict.fromkeys(contents, 0)
    for step in uses:
        after: dict[frozenset[int], int] = {}
        for (before, count), later in product(best.items(), contents):
            if later <= before | set(step):
                hits = count + len(before & set(step))
                after[later] = max(after.get(later, -1), hits)
        best = after
    return max(best.values())


@given(
    st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=2, unique=True), min_size=1, max_size=6),
    st.integers(1, 3),
)
@settings(max_examples=60, deadline=None)
def test_most_kept_is_the_optimum(uses: list[list[int]], num_slots: int) -> None:
    assert most_kept(uses, num_slots) == exhaustive(uses, num_slots)


@pytest.mark.parametrize("method", ["default", "paper", "static", "fiddler", "oracle"])
@pytest.mark.parametrize("cache", ["25%", "50%"])
def test_no_replay_beats_the_bound(method: str, cache: str) -> None:
    scenario = synthetic("deepseek-v2-lite", "default", cache, prompt_tokens=32, tokens=12)
    run = scenario.run(METHODS[method])
    assert run.ttft_s >= scenario.bound_s("prefill")
    assert run.token_s >= scenario.bound_s("decode")


def test_more_slots_never_raise_the_bound() -> None:
    scenario = synthetic("deepseek-v2-lite", "default", 8, prompt_tokens=32, tokens=8)
    bounds = [lower_bound(scenario.trace, "decode", slots, scenario.costs()) for slots in (4, 8, 16, 32, 64)]
    assert bounds == sorted(bounds, reverse=True)
