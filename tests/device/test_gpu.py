"""The device layer on a real accelerator: the same answers, from every source of transfers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hybrimoe_kt.backends.gpu_triton import TritonGpu
from hybrimoe_kt.device.page_locks import LOCKS, PAGE, fresh_pages
from hybrimoe_kt.device.torch_accelerator import TorchAccelerator

from .machine import layers, make

HARDWARE = "cuda" if torch.cuda.is_available() else "xpu" if torch.xpu.is_available() else ""


def on_hardware(test: Any) -> Any:
    """Mark a test that needs a device."""
    reason = "needs a CUDA, HIP or XPU device"
    return pytest.mark.gpu(pytest.mark.skipif(not HARDWARE, reason=reason)(test))


SCENARIOS: dict[str, dict[str, Any]] = {
    "decode": {"tokens": (1,) * 12},
    "prefill": {"tokens": (9, 14, 1)},
    "pressure": {"tokens": (1, 6, 1, 1), "cache_size": 1, "scheduler": "gpu_only"},
    "all resident": {"tokens": (1, 9, 1, 1), "cache_size": "all", "scheduler": "gpu_only"},
    "streamed prompt": {"tokens": (6, 5, 1, 6), "prefill_streaming_bytes": 2**20, "prefetch_size": 1},
    "sums in bfloat16": {"tokens": (1, 5, 1), "sums": True},
}


def play(patch: pytest.MonkeyPatch, scenario: str, tolerance: float, seeds: int, **options: Any) -> None:
    """A scenario through one backend of the device, with `options` beside its own."""
    given = {key: value for key, value in SCENARIOS[scenario].items() if key != "tokens"}
    for seed in range(seeds):
        device = TorchAccelerator(HARDWARE, torch.device(HARDWARE))
        machine = make(patch, seed, accelerator=device, deadline_s=60.0, **given | options)
        machine.tolerance = max(machine.tolerance, tolerance)
        machine.play(*SCENARIOS[scenario]["tokens"])
        assert machine.runtime.health().is_clean, "the CPU answered in the accelerator's place"


@on_hardware
@pytest.mark.parametrize("host_store", ["mapped", "page_locked"])
@pytest.mark.parametrize("backend", ["torch_reference", "torch"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_device_answers_as_the_reference(
    monkeypatch: pytest.MonkeyPatch, scenario: str, backend: str, host_store: str
) -> None:
    """Within float32 rounding: a device's products round in another order."""
    play(monkeypatch, scenario, 1e-4, seeds=3, host_store=host_store, gpu_backend=backend)


@on_hardware
@pytest.mark.parametrize("host_store", ["mapped", "page_locked"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_kernels_answer_as_the_reference(monkeypatch: pytest.MonkeyPatch, scenario: str, host_store: str) -> None:
    """Within what decode loses by rounding activations to 8 bits, 0.8 % in Triton's interpreter."""
    if reason := TritonGpu.unusable(torch.device(HARDWARE)):
        pytest.skip(reason)
    play(monkeypatch, scenario, 2e-2, seeds=2, host_store=host_store, gpu_backend="triton")


@pytest.mark.kernels
@pytest.mark.skipif(bool(HARDWARE), reason="the test above does it on the device")
def test_in_the_interpreter_they_stay_within_the_same_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step of a token and one of three: they take seconds."""
    if reason := TritonGpu.unusable(torch.device("cpu")):
        pytest.skip(reason)
    machine = make(monkeypatch, 1, gpu_backend="triton", deadline_s=60.0, scheduler="gpu_only")
    machine.tolerance = 2e-2
    machine.play(1, 3)
    assert machine.runtime.health().is_clean and machine.races == []


@on_hardware
def test_a_file_s_pages_are_registered_once_and_given_back() -> None:
    """Matrices of one file share pages; whatever the driver answers must leave no error behind for the next launch."""
    device = TorchAccelerator(HARDWARE, torch.device(HARDWARE))
    parts = [matrix.data for experts in layers() for matrix in experts.matrices]
    before = LOCKS.num_bytes
    locks = [device.register(part) for part in parts]
    assert len({lock is None for lock in locks}) == 1, "some were refused for sharing pages with the others"
    for part, lock in zip(parts, locks, strict=True):
        copied = part.to(device.device, non_blocking=True)
        assert torch.equal(copied.cpu(), part)
        if lock is not None:
            lock.release()
    assert LOCKS.num_bytes == before
    assert torch.ones(3, device=device.device).sum().item() == 3.0


@on_hardware
def test_only_pages_of_its_own_are_registered() -> None:
    """Around a tensor on the heap lie strangers' bytes, which the device could then only read."""
    device = TorchAccelerator(HARDWARE, torch.device(HARDWARE))
    heap = torch.from_numpy(np.zeros(5 * PAGE + 100, dtype=np.uint8))
    assert device.register(heap[8:]) is None
    own = fresh_pages(3 * PAGE)
    assert own is not None
    lock = device.register(own)
    assert torch.equal(own.to(device.device).cpu(), own)
    if lock is not None:
        lock.release()
    assert torch.ones(3, device=device.device).sum().item() == 3.0
