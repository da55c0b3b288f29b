"""The machine that `hybrimoe doctor` is tested on: no profile, and no GPU or one that is made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hybrimoe_kt.backends.gpu_triton import TritonGpu
from hybrimoe_kt.cli import doctor
from hybrimoe_kt.host import last_runs
from hybrimoe_kt.host.doctor import machine as machine_report

__all__ = ["GPU", "devices", "no_profile_no_gpu", "report", "with_gpu"]

GPU = {
    "name": "cuda:0",
    "model": "A [test] GPU",
    "memory_free_bytes": 20 * 2**30,
    "memory_total_bytes": 24 * 2**30,
    "compute_capability": "8.6",
    "architecture": None,
    "problem": None,
}


@pytest.fixture(autouse=True)
def no_profile_no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The machine under test has neither, whatever the tests run on."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(last_runs, "state_path", lambda: tmp_path / "last-runs.json")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("hybrimoe_kt.device.choose.choose_accelerator", lambda name: None)
    devices(monkeypatch)


def devices(monkeypatch: pytest.MonkeyPatch, *devices: dict[str, Any], driver: bool = False) -> None:
    found = {"torch_built_for": "CPU", "nvidia_driver": driver, "devices": list(devices), "problem": None}
    monkeypatch.setattr(machine_report, "inspect_accelerators", lambda: found)


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    devices(monkeypatch, GPU)
    monkeypatch.setattr(TritonGpu, "unusable", lambda device: None)


def report(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert doctor.main([*arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found
