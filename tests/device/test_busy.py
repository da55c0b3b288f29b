"""What is measured of CPU, accelerators and links in passing, with times that are made up and with the emulators."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hybrimoe_kt.core.types import ExpertId, Transfer
from hybrimoe_kt.device.accelerator import HostStamp
from hybrimoe_kt.device.busy import BusyMeter
from hybrimoe_kt.host.hf.loading import load_model
from hybrimoe_kt.runtime import Routed, Runtime
from tests.support.generated_model import GeneratedModel, Shape
from tests.support.profiles import changed_profile

TRANSFER = Transfer(ExpertId(0, 1), 0, 100, "demand")


class Later:
    """A stamp whose time is told when the test says so."""

    def __init__(self) -> None:
        self.told: float | None = None

    def at_s(self) -> float | None:
        return self.told


class Executor:
    """Remembers who watches."""

    def __init__(self, *has_times: bool) -> None:
        self.log: Any = None
        self.lanes = tuple(SimpleNamespace(accelerator=SimpleNamespace(has_times=each)) for each in has_times)

    def log_to(self, log: Any) -> None:
        self.log = log


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    now = SimpleNamespace(wall=100.0, own=5.0)
    monkeypatch.setattr(time, "perf_counter", lambda: now.wall)
    monkeypatch.setattr(time, "thread_time", lambda: now.own)
    return now


def watched_pass(meter: BusyMeter, clock: SimpleNamespace, *, launched: tuple[Any, Any] | None = None) -> None:
    """Ten seconds, four of them the host's, five the CPU's, three of link 0 and two of GPU 1."""
    meter.begin()
    began = clock.wall
    meter.computed(0, (), began + 1, began + 4)
    meter.computed(1, (), began + 6, began + 8)
    meter.sent(0, TRANSFER, 0, 1, 2, HostStamp(began + 1), HostStamp(began + 3))
    meter.sent(0, TRANSFER, 0, 2, 2, HostStamp(began + 2), HostStamp(began + 4))  # its stream was ready before the link
    before, after = launched or (HostStamp(began + 7), HostStamp(began + 9))
    meter.launched(1, 0, (1,), before, after)
    clock.wall, clock.own = clock.wall + 10, clock.own + 4
    meter.end()


def test_shares_are_of_the_time_of_watched_passes(clock: SimpleNamespace) -> None:
    meter = BusyMeter(Executor(True, True), [0, 1], every=1, first=0)  # type: ignore[arg-type]
    assert meter.shares() == {}
    for _ in range(3):
        watched_pass(meter, clock)
    meter.begin()
    # the mean of two links and two GPUs, of which one each has worked
    assert meter.shares() == pytest.approx({"cpu": 0.5, "gpu": 0.1, "link": 0.15, "host": 0.4})


def test_a_pass_counts_once_all_its_stamps_are_known(clock: SimpleNamespace) -> None:
    meter = BusyMeter(Executor(True, True), [0, 1], every=1, first=0)  # type: ignore[arg-type]
    before, after = Later(), Later()
    watched_pass(meter, clock, launched=(before, after))
    meter.begin()
    assert meter.shares() == {}
    before.told, after.told = clock.wall, clock.wall + 1
    meter.begin()
    assert meter.shares()["gpu"] == pytest.approx(0.05)


def test_stamps_that_never_come_are_given_up(clock: SimpleNamespace) -> None:
    meter = BusyMeter(Executor(True, True), [0, 1], every=1, first=0)  # type: ignore[arg-type]
    stuck = [Later() for _ in range(50)]
    for stamp in stuck:
        watched_pass(meter, clock, launched=(stamp, stamp))
    for stamp in stuck:
        stamp.told = 1.0
    meter.begin()
    assert len(meter._measured) < 10


def test_a_stamp_that_fails_stops_nothing(clock: SimpleNamespace) -> None:
    meter = BusyMeter(Executor(True, True), [0, 1], every=1, first=0)  # type: ignore[arg-type]

    class Broken:
        def at_s(self) -> float:
            raise RuntimeError("an illegal memory access was encountered")

    watched_pass(meter, clock, launched=(Broken(), Broken()))
    watched_pass(meter, clock)
    meter.begin()
    assert meter.shares()["cpu"] == pytest.approx(0.5) and len(meter._measured) == 1


def test_only_some_passes_are_watched_and_nobody_is_pushed_aside(clock: SimpleNamespace) -> None:
    executor = Executor(True)
    meter, watched = BusyMeter(executor, [3, 4], every=5, first=2), []  # type: ignore[arg-type]
    for number in range(14):
        meter.begin()
        watched += [number] * (executor.log is meter)
        meter.end()
        assert executor.log is None
    assert watched == [2, 7, 12]
    executor.log = somebody = object()
    for _ in range(10):
        meter.begin()
        meter.end()
        assert executor.log is somebody
    executor.log = None
    meter.begin()
    assert executor.log is meter
    executor.log = somebody  # who begins in the middle of a pass
    num = len(meter._waiting)
    meter.end()
    assert executor.log is somebody and len(meter._waiting) == num


def test_a_pass_that_breaks_off_is_not_counted(clock: SimpleNamespace) -> None:
    executor = Executor(True, True)
    meter = BusyMeter(executor, [0, 1], every=1, first=0)  # type: ignore[arg-type]
    meter.begin()
    meter.computed(0, (), clock.wall, clock.wall + 1000)
    for _ in range(2):
        watched_pass(meter, clock)
    meter.begin()
    assert meter.shares()["cpu"] == pytest.approx(0.5)


def test_a_device_whose_stamps_tell_nothing_has_no_share(clock: SimpleNamespace) -> None:
    meter = BusyMeter(Executor(False, False), [0, 1], every=1, first=0)  # type: ignore[arg-type]
    watched_pass(meter, clock)
    meter.begin()
    assert meter.shares() == pytest.approx({"cpu": 0.5, "host": 0.4})


# With the emulators.


def passes(runtime: Runtime, number: int) -> None:
    for seed in range(number):
        generator = torch.Generator().manual_seed(seed)
        for layer in sorted(runtime.store.layers):
            ids = torch.rand(1, 8, generator=generator).argsort(dim=1)[:, :2]
            runtime.run(layer, Routed(torch.randn(1, 256, generator=generator), ids, torch.full((1, 2), 0.5)))


def watching(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> BusyMeter:
    """Every pass."""
    meter = BusyMeter(runtime.executor, list(runtime.store.layers), every=1, first=0)
    monkeypatch.setattr(runtime, "_busy", meter)
    return meter


def test_the_timed_emulators_own_books_say_the_same(
    generated: Callable[[Shape], GeneratedModel], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With a GPU and a link so slow that what the emulator itself takes is lost in it."""
    slow = changed_profile(tmp_path, "slow", gpu_call_s=0.004, link_latency_s=0.003)
    options = {
        "accelerator": f"emulated:timed:{slow}", "profile": "default", "cache_size": "50%",
        "cpu_backend": "torch_reference", "scheduler": "gpu_only", "fallback": False, "prefetch_size": 0,
    }  # fmt: skip
    runtime = load_model(generated(Shape()).path, option_overrides=options, progress=False).runtime
    meter = watching(runtime, monkeypatch)
    device: Any = runtime.accelerators[0]
    before = dict(device.busy_s)
    passes(runtime, 21)
    time.sleep(0.01)
    meter.begin()
    measured = list(meter._measured)
    assert len(measured) == 21
    for resource in ("gpu", "link"):
        wanted = device.busy_s[resource] - before[resource]
        assert wanted > 0
        assert sum(each.busy_s[resource] for each in measured) == pytest.approx(wanted, rel=0.2), resource
    assert set(meter.shares()) == {"cpu", "gpu", "link", "host"}
    assert all(0 <= share <= 1 for share in meter.shares().values())


@pytest.mark.parametrize("accelerator", ["emulated", "emulated:adversarial:5"])
def test_watching_changes_no_answer(
    generated: Callable[[Shape], GeneratedModel], monkeypatch: pytest.MonkeyPatch, accelerator: str
) -> None:
    options = {"accelerator": accelerator, "cache_size": "50%", "cpu_backend": "torch_reference"}
    runtimes = [load_model(generated(Shape()).path, option_overrides=options, progress=False).runtime for _ in range(2)]
    meter = watching(runtimes[0], monkeypatch)
    for seed in range(12):
        inputs = (
            torch.randn(1, 256, generator=torch.Generator().manual_seed(seed)),
            torch.tensor([[seed % 8, 1 - seed % 2 + 2]]),
        )
        routed = Routed(*inputs, torch.full((1, 2), 0.5))
        for layer in sorted(runtimes[0].store.layers):
            first, second = (runtime.run(layer, routed) for runtime in runtimes)
            assert torch.equal(first, second)
    assert runtimes[0].statistics() == runtimes[1].statistics()
    assert meter.shares()
    assert ("gpu" in meter.shares()) == (accelerator == "emulated")


def test_on_the_cpu_alone_its_experts_are_what_is_measured(
    generated: Callable[[Shape], GeneratedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"accelerator": "none", "cpu_backend": "torch_reference"}
    runtime = load_model(generated(Shape()).path, option_overrides=options, progress=False).runtime
    meter = watching(runtime, monkeypatch)
    passes(runtime, 3)
    assert list(meter.shares()) == ["cpu"]
    assert 0.1 < meter.shares()["cpu"] <= 1
