"""The device layer on a real accelerator: the same answers, from every source of transfers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hybrimoe_kt.device.torch_accelerator import TorchAccelerator

from .machine import make

HARDWARE = "cuda" if torch.cuda.is_available() else "xpu" if torch.xpu.is_available() else ""


def on_hardware(test: Any) -> Any:
    """Mark a test that needs a device."""
    reason = "needs a CUDA, HIP or XPU device"
    return pytest.mark.gpu(pytest.mark.skipif(not HARDWARE, reason=reason)(test))


SCENARIOS: dict[str, dict[str, Any]] = {
    "decode": {"tokens": (1,) * 12},
    "prefill": {"tokens": (9, 14, 1)},
    "pressure": {"tokens": (1, 6, 1, 1), "cache_size": 1, "scheduler": "gpu_only"},
    "streamed prompt": {"tokens": (6, 5, 1, 6), "prefill_streaming_bytes": 2**20, "prefetch_size": 1},
    "sums in bfloat16": {"tokens": (1, 5, 1), "sums": True},
}


@on_hardware
@pytest.mark.parametrize("host_store", ["mapped", "page_locked"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_device_answers_as_the_reference(monkeypatch: pytest.MonkeyPatch, scenario: str, host_store: str) -> None:
    """Within float32 rounding: a device's products round in another order."""
    options = {key: value for key, value in SCENARIOS[scenario].items() if key != "tokens"}
    for seed in range(5):
        device = TorchAccelerator(HARDWARE, torch.device(HARDWARE))
        machine = make(monkeypatch, seed, accelerator=device, host_store=host_store, deadline_s=30.0, **options)
        machine.tolerance = machine.tolerance or 1e-4
        machine.play(*SCENARIOS[scenario]["tokens"])
        assert machine.num_failures == 0, "the CPU answered in the accelerator's place"


@on_hardware
def test_registering_shared_pages_twice() -> None:
    """Tensors of one file share pages; a refusal must leave no error behind for the next launch."""
    device = TorchAccelerator(HARDWARE, torch.device(HARDWARE))
    memory = torch.zeros(5 * 4096 + 100, dtype=torch.uint8)
    registered = [device.register(part) for part in memory.split(5000)]
    assert len(set(registered)) == 1
    assert torch.ones(3, device=device.device).sum().item() == 3.0
