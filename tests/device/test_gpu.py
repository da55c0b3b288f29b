"""The device layer on a real accelerator: the same answers, from every source of transfers."""

from __future__ import annotations

import gc
import mmap
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hybrimoe_kt.device.page_locks import LOCKS, PAGE, fresh_pages
from hybrimoe_kt.device.torch_accelerator import TorchAccelerator

from .machine import make

HARDWARE = "cuda" if torch.cuda.is_available() else "xpu" if torch.xpu.is_available() else ""
LOCKS_IN_PLACE = HARDWARE == "cuda" and torch.version.hip is None


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
TOLERANCE = {"torch_reference": 1e-4, "triton": 2e-2}
"""Float32 products that round in another order; the decode kernels also round activations to 8 bits, 0.8 %."""


def play(monkeypatch: pytest.MonkeyPatch, scenario: str, backend: str, seeds: int, **options: Any) -> None:
    options |= {key: value for key, value in SCENARIOS[scenario].items() if key != "tokens"}
    for seed in range(seeds):
        device = TorchAccelerator(HARDWARE, torch.device(HARDWARE))
        machine = make(monkeypatch, seed, accelerator=device, gpu_backend=backend, deadline_s=30.0, **options)
        machine.tolerance = machine.tolerance or TOLERANCE[backend]
        machine.play(*SCENARIOS[scenario]["tokens"])
        assert machine.runtime.health().is_clean, "the CPU answered in the accelerator's place"


@on_hardware
@pytest.mark.parametrize("host_store", ["mapped", "page_locked"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_device_answers_as_the_reference(monkeypatch: pytest.MonkeyPatch, scenario: str, host_store: str) -> None:
    play(monkeypatch, scenario, "torch_reference", 5, host_store=host_store)


@on_hardware
@pytest.mark.skipif(HARDWARE != "cuda", reason="the Triton kernels need a CUDA or HIP device")
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_and_so_do_its_kernels(monkeypatch: pytest.MonkeyPatch, scenario: str) -> None:
    play(monkeypatch, scenario, "triton", 2, host_store="page_locked")


@on_hardware
def test_registering_shared_pages_twice(tmp_path: Path) -> None:
    """Tensors of one file share pages; a refusal must leave no error behind for the next launch."""
    file = tmp_path / "weights"
    file.write_bytes(bytes(range(256)) * (5 * PAGE // 256) + b"rest")
    with file.open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of what is not writable
        memory = torch.from_numpy(np.frombuffer(mapped, dtype=np.uint8))
    one, other = (TorchAccelerator(HARDWARE, torch.device(HARDWARE)) for _ in range(2))
    locks = [accelerator.register(part) for part in memory.split(5000) for accelerator in (one, other)]
    assert len({lock is None for lock in locks}) == 1, "all, or where the driver does not allow it none"
    assert torch.ones(3, device=one.device).sum().item() == 3.0
    target = torch.empty(len(memory), dtype=torch.uint8, device=one.device)
    one.copy(one.stream("copies"), target, memory, "expert copy")
    torch.accelerator.synchronize()
    assert torch.equal(target.cpu(), memory)
    locked = LOCKS.num_bytes
    del locks
    gc.collect()
    assert LOCKS.num_bytes < locked or not locked


@on_hardware
@pytest.mark.skipif(not LOCKS_IN_PLACE, reason="only CUDA's driver is asked to lock memory in place")
def test_memory_of_its_own_pages_can_be_locked_and_the_heap_cannot() -> None:
    accelerator = TorchAccelerator(HARDWARE, torch.device(HARDWARE))
    own = fresh_pages(3 * PAGE)
    assert own is not None and accelerator.register(own) is not None
    assert accelerator.register(torch.zeros(3 * PAGE + 1, dtype=torch.uint8)[1:]) is None
