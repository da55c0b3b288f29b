"""Calibration finds what the machine was made to be, says what it found, and is not believed elsewhere."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrimoe_kt.backends.torch_reference import TorchReferenceCpu
from hybrimoe_kt.config import ExpertOptions
from hybrimoe_kt.core.cost import CostModel
from hybrimoe_kt.device.calibrate import Calibration, calibrate, link_verdict, machine_name, trusted_profile
from hybrimoe_kt.device.emulated.timed import SleepingGpu, TimedAccelerator
from hybrimoe_kt.device.host_store import HostStore
from hybrimoe_kt.errors import CalibrationError
from hybrimoe_kt.profiles import load_profile
from hybrimoe_kt.runtime import ModelExperts, Routed, assemble

from .machine import HIDDEN, LAYERS, TOP_K, layers

HARDWARE = "a6000-xeon5220r"


class SteadyCpu(TorchReferenceCpu):
    """A CPU backend that takes 1 ms a call and 2 ms an expert and token."""

    num_threads = 1

    def submit(self, layer: int, routed: Routed) -> None:
        self._ends = time.perf_counter() + 1e-3 + 2e-3 * int((routed.ids >= 0).sum())
        self._pairs = torch.zeros(*routed.ids.shape, routed.hidden.shape[1])

    def is_done(self) -> bool:
        return time.perf_counter() >= self._ends


def measured(cpu: Any = None) -> Calibration:
    store = HostStore()
    store.add(layers()[0])
    backend = cpu or SteadyCpu()
    backend.add_layer(layers()[0])
    accelerator = TimedAccelerator.named("emulated:timed", HARDWARE)
    known = load_profile(HARDWARE)
    cost = CostModel.from_profile(known, expert_bytes=layers()[0].expert_bytes)
    return calibrate(store, 0, backend, accelerator, SleepingGpu(accelerator, {0: cost}), max_tokens=8, repeats=3)


def test_it_finds_the_machine_it_is_given() -> None:
    """Link and GPU are emulated, the CPU is a clock: each is found, but for what a busy test machine adds."""
    found, known = measured(), load_profile(HARDWARE)
    profile = found.profile
    assert 0.4 <= profile.link_bytes_per_s / known.link_bytes_per_s <= 1.2
    num_bytes = layers()[0].expert_bytes
    cost = CostModel.from_profile(profile, expert_bytes=num_bytes, expert_macs=3 * HIDDEN * 64)
    assert 0.8 <= cost.cpu_s([1]) / 3e-3 <= 2.5
    assert 0.8 <= cost.cpu_s([1, 1, 1]) / 7e-3 <= 2.5
    assert 0.8 <= cost.cpu_s([8]) / 17e-3 <= 2.5
    assert 0.8 <= cost.gpu_s(1) / known.gpu_call_s <= 2.5
    assert all(sample.low_s <= sample.median_s <= sample.high_s for sample in found.samples.values())
    assert {"CPU, 1 expert, 1 token", "GPU, 1 expert, 1 token", "link, 32 MiB pageable"} <= found.samples.keys()
    assert f"GPU, {TOP_K} experts, 8 tokens each" in found.samples, "one expert does not fill a large GPU"


def test_the_file_is_a_profile(tmp_path: Path) -> None:
    found = measured()
    file = found.save(tmp_path / "deep" / "here.json")
    assert (
        load_profile(file).machine
        == found.profile.machine
        == machine_name(TimedAccelerator.named("emulated:timed", HARDWARE), SteadyCpu())
    )
    assert all(json.loads(file.read_text())["source"].values())


def test_another_machines_profile_is_refused(tmp_path: Path) -> None:
    file = measured().save(tmp_path / "there.json")
    with pytest.raises(CalibrationError, match=r"was measured on another machine .* run `hybrimoe calibrate` here"):
        trusted_profile(str(file), "some other machine")
    assert trusted_profile("default", "any machine").name == "default"


def test_the_runtime_measures_briefly_when_nothing_is_known(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options = ExpertOptions(
        accelerator=f"emulated:timed:{HARDWARE}", cpu_backend="torch_reference", cache_size=2, max_chunk_tokens=4,
        fallback=False,
    )  # fmt: skip
    experts = ModelExperts(options)
    for made in layers():
        experts.add(made)
    with caplog.at_level(logging.WARNING):
        runtime = assemble(experts)
    assert any("no profile of this machine yet" in record.message for record in caplog.records)
    assert runtime.configuration()["profile"]["name"] == "measured"
    for layer in range(LAYERS):
        weights = torch.full((1, TOP_K), 1 / TOP_K)
        runtime.run(layer, Routed(torch.randn(1, HIDDEN), torch.tensor([[0, 3, 5]]), weights))


@pytest.mark.parametrize(
    ("rate", "verdict"),
    [
        (21.3e9, "link 21.3 GB/s: PCIe 4 x16 as expected"),
        (12.4e9, "link 12.4 GB/s: PCIe 3 x16 as expected"),
        (52e9, "link 52.0 GB/s: PCIe 5 x16 as expected"),
        (1e9, "check the slot, a riser"),
    ],
)
def test_the_link_is_named(rate: float, verdict: str) -> None:
    assert verdict in link_verdict(rate)
