"""Hybrid plans give way when one device alone measures faster, twice, and only then."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from hybrimoe_kt.core.feedback import Fallback

FIRST, PROBE = 16, 4


def run(
    hybrid_s: float, single_s: float, steps: int, *, noise: float = 0.0, seed: int = 0
) -> tuple[Fallback, list[str | None]]:
    fallback, draw, used = Fallback(first=FIRST, probe=PROBE), random.Random(seed), []
    for _ in range(steps):
        used.append(fallback.scheduler)
        if fallback.wants_prediction:
            fallback.predict(cpu_s=single_s, gpu_s=2 * single_s)
        seconds = hybrid_s if fallback.scheduler is None else single_s
        fallback.observe(seconds * draw.lognormvariate(0.0, noise))
    return fallback, used


def test_a_faster_device_is_kept_after_two_trials() -> None:
    fallback, used = run(hybrid_s=2.0, single_s=1.0, steps=100)
    assert fallback.has_fallen and fallback.scheduler == "cpu_only"
    assert used[: FIRST + 3 * PROBE] == [None] * FIRST + ["cpu_only"] * PROBE + [None] * PROBE + ["cpu_only"] * PROBE
    assert set(used[FIRST + 2 * PROBE :]) == {"cpu_only"}


@pytest.mark.parametrize("single_s", [1.0, 0.97, 3.0])
def test_a_device_that_is_no_faster_is_tried_ever_more_rarely(single_s: float) -> None:
    fallback, used = run(hybrid_s=1.0, single_s=single_s, steps=2000)
    assert not fallback.has_fallen
    trials = sum(was is None and now is not None for was, now in pairwise(used))
    assert 5 <= trials <= 8, "16, 32, 64, ... steps apart"


def test_noise_alone_does_not_decide() -> None:
    assert not any(run(1.0, 1.5, 3000, noise=0.1, seed=seed)[0].has_fallen for seed in range(20))


def test_the_better_predicted_device_is_tried() -> None:
    fallback = Fallback(first=FIRST, probe=PROBE)
    for _ in range(FIRST):
        if fallback.wants_prediction:
            fallback.predict(cpu_s=3.0, gpu_s=1.0)
        fallback.observe(1.0)
    assert fallback.scheduler == "gpu_only"
