"""What the probes say of devices and libraries that this machine does not have."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from hybrimoe_kt.device import inspect_machine
from hybrimoe_kt.device.inspect_machine import attempt, inspect_cpu, inspect_library


def _cuda(**changed: Any) -> Any:
    properties = SimpleNamespace(total_memory=24 * 2**30, gcnArchName="gfx1100")
    module = {
        "__name__": "torch.cuda",
        "get_device_name": lambda index: "a GPU",
        "get_device_properties": lambda index: properties,
        "get_device_capability": lambda index: (8, 6),
        "mem_get_info": lambda index: (2**30, 24 * 2**30),
    }
    return SimpleNamespace(**module | changed)


def test_a_cuda_and_a_hip_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect_machine, "_is_hip", lambda: False)
    assert inspect_machine._device(_cuda(), 1) == {
        "name": "cuda:1", "model": "a GPU", "memory_free_bytes": 2**30, "memory_total_bytes": 24 * 2**30,
        "compute_capability": "8.6", "architecture": None, "problem": None,
    }  # fmt: skip
    monkeypatch.setattr(inspect_machine, "_is_hip", lambda: True)
    found = inspect_machine._device(_cuda(), 0)
    assert (found["compute_capability"], found["architecture"]) == (None, "gfx1100")


def test_a_device_that_does_not_answer() -> None:
    def lost(index: int) -> None:
        raise RuntimeError("CUDA error: device lost\nand a long explanation")

    found = inspect_machine._device(_cuda(mem_get_info=lost), 0)
    assert found["problem"] == "RuntimeError: CUDA error: device lost"
    assert found.keys() == inspect_machine._device(_cuda(), 0).keys()


def test_libraries_of_other_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.requires", lambda name: ["gguf==0.1; extra == 'x'", "gguf-more>=9"])
    assert inspect_library("gguf", "gguf")["problem"] == "this package wants ==0.1"
    assert inspect_library("no-such-thing", "no_such_thing") == {
        "version": None, "wanted": None, "problem": "not installed",
    }  # fmt: skip


def test_a_processor_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect_machine, "_read", lambda path: "")
    found = inspect_cpu()
    assert found["model"] and found["physical_cores"] >= 1


def test_an_error_without_words_is_named() -> None:
    def mute() -> dict[str, Any]:
        raise KeyError

    assert attempt(mute, found=None) == {"found": None, "problem": "KeyError: KeyError"}
