"""Streams of a token that a device plans, in whatever order they work: no race, and every wait is needed."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from hybrimoe_kt.device.emulated.adversarial import AdversarialAccelerator
from hybrimoe_kt.device.emulated.adversary import Adversary
from hybrimoe_kt.device.emulated.journal import Entry, JournalAccelerator
from hybrimoe_kt.device.step_graph import StepLost
from hybrimoe_kt.kernels.plan_tables import ARRIVING
from hybrimoe_kt.runtime import Routed
from hybrimoe_kt.runtime.device_planner import DevicePlanner
from hybrimoe_kt.runtime.recovery import Recovery
from tests.device.machine import EXPERTS, LAYERS, TOP_K, Gates, Machine, make

WAITS = (
    "look ahead before the next plan",
    "plan before copies on demand",
    "copies on demand before late experts",
    "plan before look ahead",
    "look ahead before its copies",
    "everything before the token's end",
)


class Planning(AdversarialAccelerator):
    """Its streams are the adversary's; the CPU's share is the thread's that answers."""

    can_plan = True

    def watch_cpu(self, backend: Any) -> Any:
        return backend


def planned(patch: pytest.MonkeyPatch, seed: int, *, ignore: str | None = None, **options: Any) -> Tokens:
    accelerator = Planning(Adversary(seed, ignore=ignore), "emulated:0")
    defaults = {"planner": "device", "gpu_backend": "torch_reference", "cache_size": 4, "host_store": "page_locked"}
    machine = make(patch, seed, accelerator=accelerator, **(defaults | options))
    return Tokens(machine, accelerator)


class Tokens:
    """Plays tokens through a planner whose work goes to streams."""

    def __init__(self, machine: Machine, accelerator: Any) -> None:
        self.machine, self.accelerator, runtime = machine, accelerator, machine.runtime
        gates = {number: Gates(machine, number, 0.6) for number in range(LAYERS - 1)}
        recovery = Recovery(runtime.coordinator, runtime.executor)
        self.planner = DevicePlanner(
            runtime.experts, runtime.coordinator, runtime.executor, gates, recovery, lambda *_: None, forks=True
        )
        self.num_arrived = 0
        if isinstance(accelerator, Planning):
            self._land()

    def _land(self) -> None:
        """A wait for arrivals lets the others go on, as a kernel that polls does."""
        planning, queue = self.planner._planning, self.accelerator.compute.queue

        def wait_landed(place: int, timed_out: torch.Tensor) -> None:
            row = planning.tables.rows[place]
            doing, slots = row.record[TOP_K : 2 * TOP_K], row.record[2 * TOP_K : 3 * TOP_K]
            waited = slots[doing == ARRIVING].tolist()
            self.num_arrived += len(waited)
            queue.is_stalled = True
            while any(int(row.issued[slot]) > int(row.landed[slot]) for slot in waited):
                assert self.accelerator.adversary.step(), "it would be waited for ever"
            queue.is_stalled = False

        planning.wait_landed = wait_landed  # type: ignore[method-assign]

    def delay(self, name: str) -> None:
        """Let a stream hardly ever have its turn."""
        for queue in self.accelerator.adversary.queues:
            if queue.name.endswith(name):
                queue.weight = 1e-4

    def play(self, num_tokens: int) -> None:
        for _ in range(num_tokens):
            self.planner.begin_step()
            self.planner._planning.tables.gains.fill_(1)  # experts this small are never worth bringing ahead of need
            layers = []
            for layer in range(LAYERS):
                inputs = self.machine.inputs(layer, 1)
                given = self.machine.given(layer, inputs)
                scores = torch.tensor([self.machine.random.random() for _ in range(EXPERTS)])
                answer = self.planner.enqueue(layer, Routed(*given), scores / scores.sum())
                layers.append((answer, inputs, given))
            self.planner.join_streams()
            self.planner.end_step()
            for layer, (answer, inputs, given) in enumerate(layers):
                self.accelerator.on_host("answers", reads=(answer,), writes=given)
                self.machine.check(layer, answer, inputs)


@pytest.mark.parametrize("seed", [pytest.param(n, marks=() if n < 8 else pytest.mark.slow) for n in range(48)])
def test_in_whatever_order_streams_work_there_is_no_race(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    tokens = planned(monkeypatch, seed, scheduler=("balanced", "paper", "gpu_only", "static")[seed % 4])
    if seed % 2:
        tokens.delay("planned prefetches")
    tokens.play(8)
    assert not tokens.machine.races
    tokens.planner.give_back()
    tokens.machine.runtime.coordinator.check_integrity()
    counted = tokens.machine.runtime.coordinator.stats.snapshot()
    assert counted["num_plans"] == 8 * LAYERS and counted["hits"] and counted["misses"]


def test_something_arrives_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else nothing above would have waited for what is under way."""
    num_arrived = 0
    for seed in range(8):
        tokens = planned(monkeypatch, seed, prefetch_size=3, scheduler="gpu_only")
        tokens.delay("planned prefetches")
        tokens.play(6)
        assert not tokens.machine.races
        num_arrived += tokens.num_arrived
    assert num_arrived > 10


@pytest.mark.parametrize("site", WAITS)
def test_no_wait_is_left_out_unnoticed(monkeypatch: pytest.MonkeyPatch, site: str) -> None:
    """Whatever else goes wrong without it, the race is seen."""
    tokens = planned(monkeypatch, 1, ignore=site, deadline_s=0.5)
    with contextlib.suppress(AssertionError, StepLost, RuntimeError):
        tokens.play(4)
    assert tokens.accelerator.adversary.ignored, "there is such a wait"
    assert tokens.machine.races


class NotingStream:
    """Waits for nothing, and writes down that it should."""

    def __init__(self, name: str, entries: list[Entry]) -> None:
        self.name, self._entries = name, entries

    def wait(self, event: Any, site: str) -> None:
        self._entries.append(Entry(self.name, f"wait: {site}", 0, "launch"))

    def record(self, event: Any, site: str) -> None:
        pass


class Noting(JournalAccelerator):
    """Its journal has waits, too."""

    def __init__(self) -> None:
        super().__init__("emulated:0")
        self.compute = self.stream("compute")

    def stream(self, name: str, *, low_priority: bool = False) -> Any:
        return NotingStream(name, self.entries)


def test_what_can_run_side_by_side_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Residents wait for no copy, copies ahead of need hold nobody up, and the CPU is waited for last."""
    accelerator = Noting()
    options = {"planner": "device", "gpu_backend": "torch_reference", "cache_size": 4, "host_store": "page_locked"}
    tokens = Tokens(make(monkeypatch, 0, accelerator=accelerator, **options), accelerator)
    tokens.play(1)
    del accelerator.entries[:]
    tokens.play(1)
    layer = [
        "plan a step", "experts", "wait: copies on demand before late experts", "wait for arrivals", "experts",
        "wait for the CPU's share", "CPU answer to device", "join",
    ]  # fmt: skip
    later = ["wait: look ahead before the next plan", *layer]
    ends = ["wait: everything before the token's end"] * 3
    assert [entry.site for entry in accelerator.entries if entry.stream == "compute"] == [
        *layer, *later * (LAYERS - 1), *ends,
    ]  # fmt: skip
    for name, sites in (
        ("planned copies", ["wait: plan before copies on demand", "bring on demand"]),
        ("planned prefetches", ["wait: look ahead before its copies", "bring ahead of need"]),
    ):
        assert [entry.site for entry in accelerator.entries if entry.stream == name] == sites * LAYERS
    first = accelerator.sites.index
    assert first("bring on demand") < first("experts"), "the link has its work before the experts have theirs"
    assert first("bring ahead of need") < first("wait for the CPU's share")


def test_steps_of_the_host_come_between(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts and tokens, with copies of their own into the same slots."""
    for seed in range(4):
        tokens = planned(monkeypatch, seed, scheduler="gpu_only")
        for _ in range(3):
            tokens.play(2)
            tokens.planner.give_back()
            tokens.machine.play(1, 4)
        assert not tokens.machine.races
        assert tokens.machine.runtime.coordinator.stats.num_transfers
