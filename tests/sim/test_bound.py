"""The lower bound is one: exhaustive search finds no better, and no replay beats it."""

from __future__ import annotations

from itertools import combinations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrimoe_kt.sim.bound import _hull, lower_bound, most_kept
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
@pytest.mark.parametrize(("hardware", "cache"), [("default", "25%"), ("a6000-xeon5220r", "50%")])
def test_no_replay_beats_the_bound(method: str, hardware: str, cache: str) -> None:
    scenario = synthetic("deepseek-v2-lite", hardware, cache, prompt_tokens=32, tokens=12)
    run = scenario.run(METHODS[method])
    assert run.ttft_s >= scenario.bound_s("prefill") * (1 - 1e-12)
    assert run.token_s >= scenario.bound_s("decode") * (1 - 1e-12)


def test_more_slots_never_raise_the_bound() -> None:
    scenario = synthetic("deepseek-v2-lite", "default", 8, prompt_tokens=32, tokens=8)
    bounds = [lower_bound(scenario.trace, "decode", slots, scenario.costs()) for slots in (4, 8, 16, 32, 64)]
    assert bounds == sorted(bounds, reverse=True)


@given(st.lists(st.floats(0, 10, allow_subnormal=False), min_size=1, max_size=8))
def test_hull_is_convex_and_below(values: list[float]) -> None:
    hull = _hull(values)
    assert len(hull) == len(values)
    assert all(low <= value + 1e-9 for low, value in zip(hull, values, strict=True))
    assert (hull[0], hull[-1]) == (values[0], values[-1])
    assert all(hull[i - 1] + hull[i + 1] >= 2 * hull[i] - 1e-9 for i in range(1, len(hull) - 1))
