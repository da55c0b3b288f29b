"""The timed emulator keeps its own books: work ends when its profile says, in the order a device would serve it."""

from __future__ import annotations

import time

import pytest
import torch

from hybrimoe_kt.device.emulated.timed import SMALL_BYTES, TimedAccelerator

MEGABYTE = 10**6


@pytest.fixture
def device() -> TimedAccelerator:
    """10.36 GB/s: 0.965 ms for 10 MB."""
    return TimedAccelerator.named("emulated:timed", "a6000-xeon5220r")


def ends_s(device: TimedAccelerator, stream: object) -> float:
    """When everything given to `stream` will have ended, on the clock."""
    event = device.event()
    stream.record(event, "test")
    return event.at_s


def copy(device: TimedAccelerator, stream: object, target: torch.Tensor) -> None:
    device.copy(stream, target, torch.empty_like(target), "test")


def test_copies_share_one_link(device: TimedAccelerator) -> None:
    memory = device.allocate(100 * MEGABYTE)
    first, second = device.stream("a"), device.stream("b")
    copy(device, first, memory)
    copy(device, second, memory)
    one, two = ends_s(device, first), ends_s(device, second)
    assert two - one == pytest.approx(100e6 / 10.36e9, rel=0.01)
    assert device.busy_s["link"] == pytest.approx(200e6 / 10.36e9, rel=0.01)


def test_small_copies_pass_between_large_ones(device: TimedAccelerator) -> None:
    memory, small = device.allocate(400 * MEGABYTE), device.allocate(SMALL_BYTES)
    bulk, compute = device.stream("bulk"), device.compute
    ends = []
    for _ in range(3):
        copy(device, bulk, memory)
        ends.append(ends_s(device, bulk))
    copy(device, compute, small)
    assert ends[0] <= ends_s(device, compute) < ends[1]


def test_answers_do_not_queue_behind_transfers(device: TimedAccelerator) -> None:
    """Device to host has a direction of its own, and its bytes really arrive."""
    bulk = device.stream("bulk")
    copy(device, bulk, device.allocate(400 * MEGABYTE))
    host, values = torch.zeros(8), torch.arange(8.0)
    device.copy(device.compute, host, values, "test")
    assert torch.equal(host, values)
    assert ends_s(device, device.compute) < ends_s(device, bulk)


def test_a_stream_waits_for_another(device: TimedAccelerator) -> None:
    bulk, event = device.stream("bulk"), device.event()
    copy(device, bulk, device.allocate(300 * MEGABYTE))
    bulk.record(event, "test")
    assert not event.is_done()
    device.compute.wait(event, "test")
    device.launch(device.compute, lambda: device.occupy(0.005), reads=(), writes=(), site="test")
    assert ends_s(device, device.compute) - event.at_s == pytest.approx(0.005, rel=0.01)
    time.sleep(max(0.0, event.at_s - time.perf_counter()))
    assert event.is_done()
