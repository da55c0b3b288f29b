"""Profiles that promise too much: the CPU's pace is learnt; hybrid plans that measure slower give way, once."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrimoe_kt.backends.torch_reference import TorchReferenceCpu
from hybrimoe_kt.config import ExpertOptions
from hybrimoe_kt.core.feedback import Fallback
from hybrimoe_kt.core.types import Plan
from hybrimoe_kt.profiles import load_profile
from hybrimoe_kt.runtime import ModelExperts, Routed, Runtime, assemble, feedback
from tests.device.machine import HIDDEN, LAYERS, TOP_K, layers
from tests.support.profiles import changed_profile


def assembled(options: ExpertOptions, **given: Any) -> Runtime:
    experts = ModelExperts(options)
    for layer in layers():
        experts.add(layer)
    return assemble(experts, **given)


def decode(runtime: Runtime, steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for layer in range(LAYERS):
            ids = torch.randperm(8, generator=generator)[None, :TOP_K]
            hidden = torch.randn(1, HIDDEN, generator=generator)
            runtime.run(layer, Routed(hidden, ids, torch.full((1, TOP_K), 1 / TOP_K)))


@pytest.mark.parametrize("wanted", [True, False])
def test_hybrid_plans_give_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, wanted: bool
) -> None:
    monkeypatch.setattr(feedback, "Fallback", lambda: Fallback(first=24, probe=9))
    slow = changed_profile(tmp_path, "slow", gpu_call_s=0.01)
    options = ExpertOptions(
        accelerator=f"emulated:timed:{slow}", profile="default", cpu_backend="torch_reference", cache_size="50%",
        max_chunk_tokens=4, fallback=wanted,
    )  # fmt: skip
    runtime = assembled(options)
    with caplog.at_level(logging.WARNING):
        decode(runtime, 40)
        on_gpu = runtime.coordinator.stats.experts_on_gpu
        decode(runtime, 5)
    told = [record.message for record in caplog.records if "measured slower than" in record.message]
    assert len(told) == wanted
    assert (runtime.coordinator.stats.experts_on_gpu == on_gpu) == wanted, "the CPU alone from then on"


class LateCpu(TorchReferenceCpu):
    """Takes a millisecond for whatever it is given."""

    def submit(self, *given: Any) -> None:
        super().submit(*given)
        self.ends_s = time.perf_counter() + 0.001

    def is_done(self) -> bool:
        return time.perf_counter() > self.ends_s


@pytest.mark.parametrize("wanted", [True, False])
def test_predictions_follow_the_cpu(tmp_path: Path, wanted: bool) -> None:
    quick = changed_profile(tmp_path, "quick", cpu_call_s=1e-6, cpu_expert_s=1e-9)
    options = ExpertOptions(
        accelerator="emulated:timed:default", profile=str(quick), cpu_backend="torch_reference", cache_size="50%",
        max_chunk_tokens=4, fallback=False, follow_pace=wanted,
    )  # fmt: skip
    plans: list[Plan] = []
    runtime = assembled(options, cpu=LateCpu(), on_plan=lambda plan, routing: plans.append(plan))
    decode(runtime, 1)
    runtime.coordinator.use("cpu_only")
    decode(runtime, 1)
    at_first = plans[-1].cpu_s
    decode(runtime, 64)
    assert (plans[-1].cpu_s > 2 * at_first) == wanted


def on_the_clock(**options: Any) -> Runtime:
    return assembled(
        ExpertOptions(
            accelerator="emulated:timed:default", profile="default", cpu_backend="torch_reference", cache_size="50%",
            max_chunk_tokens=4, fallback=False, **options,
        )
    )  # fmt: skip


@pytest.mark.parametrize("between_s", [0.001, 0.003])
def test_the_time_between_layers_is_learnt(monkeypatch: pytest.MonkeyPatch, between_s: float) -> None:
    """The profile guesses it; prefetches are sized by it."""
    runtime = on_the_clock()
    assert runtime.coordinator.between_layers_s(1) < 0.5 * between_s
    run = runtime.run
    monkeypatch.setattr(runtime, "run", lambda *given: (run(*given), time.sleep(between_s))[0])
    decode(runtime, 50)
    assert runtime.coordinator.between_layers_s(1) > 0.9 * between_s, "a busy machine only takes longer"


def test_a_runtime_that_does_not_follow_keeps_the_guess() -> None:
    runtime = on_the_clock(follow_pace=False)
    decode(runtime, 30)
    assert runtime.coordinator.between_layers_s(1) == load_profile("default").gpu_layer_s
