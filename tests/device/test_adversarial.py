"""In the worst order that hardware might choose, every answer is right and no two accesses race."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .machine import CHUNK, LAYERS, Machine, make

BUSY_LINK = Path(__file__).parents[1] / "data" / "profiles" / "busy-link.json"
SCENARIOS: dict[str, dict[str, Any]] = {
    "decode": {"tokens": (1,) * 5},
    "prefill": {"tokens": (9, 14, 1)},
    "two devices": {"tokens": (1, 1, 7, 1), "num_accelerators": 2},
    "aborts": {"tokens": (1,) * 5, "right_guesses": 0.1, "prefetch_size": 5, "profile": str(BUSY_LINK)},
    "streamed prompt": {"tokens": (6, 5, 1, 6, 6), "prefill_streaming_bytes": 2**20, "prefetch_size": 1},
    "wrongly streamed": {
        "tokens": (6,) * 4,
        "prefill_streaming_bytes": 2**20,
        "right_guesses": 0.0,
        "scheduler": "gpu_only",
        "cache_size": 1,
    },
    "sums in bfloat16": {"tokens": (1, 5, 1, 1), "sums": True},
    "pressure": {"tokens": (1, 6, 1, 1), "cache_size": 1, "scheduler": "gpu_only"},
    "all resident": {"tokens": (1, 1, 9, 1, 6, 1), "cache_size": "all", "scheduler": "gpu_only"},
    "all resident, sums": {"tokens": (1, 9, 1), "cache_size": "all", "scheduler": "gpu_only", "sums": True},
}
QUICK_SEEDS, ALL_SEEDS = 16, 1000


def trial(seed: int, scenario: str, **changes: Any) -> Machine:
    options = SCENARIOS[scenario] | changes
    with pytest.MonkeyPatch.context() as patch:
        machine = make(patch, seed, **{key: value for key, value in options.items() if key != "tokens"})
        machine.play(*options["tokens"])
        return machine


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_no_order_gives_another_answer(scenario: str) -> None:
    check(scenario, range(QUICK_SEEDS))


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_no_order_gives_another_answer_whatever_the_seed(scenario: str) -> None:
    check(scenario, range(QUICK_SEEDS, ALL_SEEDS))


def check(scenario: str, seeds: range) -> None:
    totals = {"transfers": 0, "prefetches": 0, "aborted": 0, "on both": 0, "streamed": 0}
    for seed in seeds:
        machine = trial(seed, scenario)
        assert not machine.races, f"seed {seed}: {machine.races}"
        assert machine.num_failures == 0, "the CPU answered in the accelerator's place"
        machine.runtime.statistics()  # counts what was not read when it was computed
        stats = machine.runtime.coordinator.stats
        totals["transfers"] += stats.num_transfers
        totals["prefetches"] += stats.num_prefetches
        totals["streamed"] += stats.num_streamed
        totals["aborted"] += stats.num_aborted
        totals["on both"] += min(stats.experts_on_cpu, stats.experts_on_gpu)
    if "all resident" in scenario:
        steps = SCENARIOS[scenario]["tokens"]
        assert stats.num_plans == LAYERS * sum(-(-tokens // CHUNK) for tokens in steps)
        assert totals["transfers"] == totals["on both"] == totals["prefetches"] == stats.misses == 0, totals
        is_read = machine.runtime.seconds.read > 0.0
        assert is_read == ("sums" in scenario), "nothing is read but for a backend that must be told what is routed"
        return
    assert totals["transfers"] > 0, "the scenario moved nothing"
    if scenario not in ("pressure", "wrongly streamed"):
        assert totals["prefetches"] > 0 and totals["on both"] > 0, totals
    assert (totals["streamed"] > 0) == ("streamed" in scenario)
    if scenario == "aborts":
        assert totals["aborted"] > 0, totals


@pytest.mark.parametrize("scheduler", ["gpu_only", "balanced"])
def test_a_prompt_that_ends_before_its_time_leaves_nothing_behind(scheduler: str) -> None:
    """What was streamed for its next layer must not be taken for what the next prompt streams there."""
    for seed in range(8):
        with pytest.MonkeyPatch.context() as patch:
            machine = make(
                patch, seed, prefill_streaming_bytes=2**20, prefetch_size=1, cache_size=1, scheduler=scheduler
            )
            for last in (0, 1, 0):
                for layer in range(last + 1):
                    machine.run(layer, 6)
                machine.guessed.clear()
                machine.play(6)
            assert not machine.races and machine.num_failures == 0
            assert machine.runtime.coordinator.stats.num_streamed > 0
