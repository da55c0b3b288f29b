"""How a device's events become times of the host's clock, with a device that is made up."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hybrimoe_kt.device import torch_accelerator
from hybrimoe_kt.device.torch_accelerator import TorchAccelerator


class Device:
    """Counts its own milliseconds, which begin long before the host's."""

    def __init__(self, *, has_times: bool = True) -> None:
        self.now_ms, self.has_times, self.num_waits = 5e6, has_times, 0

    def event(self, device: Any, enable_timing: bool = False) -> Any:
        if enable_timing and not self.has_times:
            raise RuntimeError("events have no times on this device")
        return Event(self)

    def synchronize(self, device: Any) -> None:
        self.num_waits += 1


class Event:
    def __init__(self, device: Device) -> None:
        self._device, self._at_ms = device, float("inf")

    def query(self) -> bool:
        return self._at_ms <= self._device.now_ms

    def synchronize(self) -> None:
        assert self.query()

    def elapsed_time(self, later: Event) -> float:
        assert self.query() and later.query(), "both must have been reached"
        return later._at_ms - self._at_ms


class Stream:
    """Runs what it is given `behind_ms` later."""

    def __init__(self, device: Device, behind_ms: float = 0.0) -> None:
        self._device, self._behind_ms = device, behind_ms

    def record_event(self, event: Event) -> None:
        event._at_ms = self._device.now_ms + self._behind_ms


def accelerator(monkeypatch: pytest.MonkeyPatch, device: Device) -> TorchAccelerator:
    monkeypatch.setattr(torch, "Event", device.event)
    monkeypatch.setattr(torch.accelerator, "synchronize", device.synchronize)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda _: Stream(device))
    made = object.__new__(TorchAccelerator)
    made.device, made._clock, made._has_clock = torch.device("cuda", 0), None, True
    return made


def test_a_stamp_is_known_once_its_stream_has_come_there(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    made = accelerator(monkeypatch, device)
    before = time.perf_counter()
    stamp = made.stamp(SimpleNamespace(stream=Stream(device, behind_ms=250.0)))
    after = time.perf_counter()
    assert stamp.at_s() is None
    device.now_ms += 1000.0
    at_s = stamp.at_s()
    assert at_s is not None and before + 0.250 <= at_s <= after + 0.250
    assert made.stamps_are == "events of the device"


def test_the_clock_is_read_anew_only_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    made = accelerator(monkeypatch, device)
    for _ in range(3):
        made.stamp(SimpleNamespace(stream=Stream(device)))
    assert device.num_waits == 1
    monkeypatch.setattr(torch_accelerator, "_CLOCK_HOLDS_S", -1.0)
    made.stamp(SimpleNamespace(stream=Stream(device)))
    assert device.num_waits == 2


def test_without_times_of_events_the_host_s_clock_serves_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(has_times=False)
    made = accelerator(monkeypatch, device)
    before = time.perf_counter()
    at_s = made.stamp(SimpleNamespace(stream=Stream(device))).at_s()
    assert at_s is not None and before <= at_s <= time.perf_counter()
    assert "host clock when work is given" in made.stamps_are
