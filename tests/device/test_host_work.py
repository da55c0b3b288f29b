"""What the host does for a step: how often it copies, launches, reads and waits. A right answer does not show it."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from hybrimoe_kt.backends.gpu_torch import TorchReferenceGpu
from hybrimoe_kt.device import cores, waiting
from hybrimoe_kt.device.emulated.faults import Faults
from hybrimoe_kt.device.emulated.journal import JournalAccelerator
from hybrimoe_kt.device.torch_accelerator import TorchAccelerator
from hybrimoe_kt.device.waiting import Deadline
from hybrimoe_kt.errors import CapacityError

from .machine import EXPERTS, LAYERS, TOP_K, Machine, make


def journal(monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[Machine, JournalAccelerator]:
    accelerator = JournalAccelerator()
    machine = make(monkeypatch, 0, accelerator=accelerator, **options)
    accelerator.entries.clear()
    return machine, accelerator


def test_a_small_expert_is_one_copy_from_a_page_locked_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """On demand or ahead of need; the layers here hold planes, whose pieces would be dozens of copies."""
    options: dict[str, Any] = {"host_store": "page_locked", "cache_size": 2, "transfer_chunk_bytes": 0}
    machine, accelerator = journal(monkeypatch, **options)
    machine.play(1, 1, 1, 4)
    stats = machine.runtime.coordinator.stats
    assert stats.num_transfers and stats.num_prefetches
    waiting_still = len(machine.runtime.lanes[0].queue.waiting)
    sent = accelerator.sites.count("expert copy")
    assert stats.num_transfers <= sent <= stats.num_transfers + stats.num_prefetches - waiting_still
    assert "take blocks apart" not in accelerator.sites


def test_a_large_one_is_cut_where_its_slot_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each piece one copy, whatever planes it meets."""
    options = {"host_store": "page_locked", "cache_size": 2, "transfer_chunk_bytes": 4096, "prefetch_size": 0}
    machine, accelerator = journal(monkeypatch, **options)
    queue = machine.runtime.lanes[0].queue
    slot_bytes = {layer: layout.slot_bytes for layer, layout in machine.runtime.store.layouts.items()}
    for layer, chunks in queue._chunks.items():
        assert [chunk.stop - chunk.start for chunk in chunks[:-1]] == [4096] * (len(chunks) - 1)
        assert chunks[0].start == 0 and chunks[-1].stop == slot_bytes[layer]
    machine.play(1)
    assert accelerator.sites.count("expert copy") == machine.runtime.coordinator.stats.num_transfers


def test_gates_are_asked_behind_the_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, accelerator = journal(monkeypatch, scheduler="gpu_only")
    machine.run(0, 1)
    sites = accelerator.sites
    assert sites.index("gates") > sites.index("experts") > sites.index("routing to host")
    assert sites.count("gates") == 1


def test_a_layer_that_is_whole_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, accelerator = journal(monkeypatch, cache_size="all", scheduler="gpu_only")
    machine.play(1, 5)
    assert "routing to host" not in accelerator.sites and "gates" not in accelerator.sites
    assert accelerator.sites.count("slot tables to device") == LAYERS, "once a layer, not once a step"
    assert accelerator.sites.count("experts") == 2 * LAYERS
    stats = machine.runtime.statistics()
    assert stats["hit_rate"] == 1.0 and stats["num_plans"] == 2 * LAYERS
    assert stats["hits"] >= LAYERS * (TOP_K + TOP_K)
    assert machine.runtime.statistics()["hits"] == stats["hits"], "counted once"
    before = machine.runtime.coordinator.heat()["hits"][0]
    machine.run(0, 1)
    machine.runtime.statistics()
    after = machine.runtime.coordinator.heat()["hits"][0]
    last = machine.runtime.coordinator.last_token()
    assert [b - a for a, b in zip(before, after, strict=True)] == [int(e in last["hits"][0]) for e in range(EXPERTS)]
    assert last["misses"][0] == []


def test_a_backend_that_computes_all_it_is_given_is_given_what_is_routed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Named all of a layer's experts, plain torch would dequantise every one of them in every step."""
    machine, accelerator = journal(monkeypatch, cache_size="all", scheduler="gpu_only", sums=True)
    gpu = machine.runtime.lanes[0].gpu
    given: list[int] = []
    launch = gpu.launch
    monkeypatch.setattr(
        gpu, "launch", lambda layer, slots, *rest: (given.append(len(slots)), launch(layer, slots, *rest))[1]
    )
    machine.play(1)
    assert given == [TOP_K] * LAYERS
    assert "routing to host" in accelerator.sites


def test_one_that_the_scheduler_shares_with_the_cpu_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """These experts are so small that a launch takes longer than the CPU."""
    machine, accelerator = journal(monkeypatch, cache_size="all", scheduler="balanced", prefetch_size=0)
    machine.play(1)
    assert machine.runtime.coordinator.stats.experts_on_cpu > 0
    assert "routing to host" in accelerator.sites


def test_a_whole_layer_is_read_where_its_gates_look_at_one_that_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, accelerator = journal(monkeypatch, cache_size="all", scheduler="gpu_only")
    machine.runtime.coordinator.drop(1, 0)
    machine.run(0, 1)
    assert "routing to host" in accelerator.sites
    accelerator.entries.clear()
    machine.run(2, 1)
    assert "routing to host" not in accelerator.sites, "nothing follows the last layer"


def test_a_whole_layer_that_fails_is_computed_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for at in range(28):
        faults = Faults("launch", at, "raise")
        machine = make(monkeypatch, at, faults=faults, cache_size="all", scheduler="gpu_only")
        machine.play(1, 4, 1)
        assert faults.site is not None and machine.num_failures == 1
        assert not machine.races


def test_one_that_fails_every_second_step_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each success between two failures used to forgive them all."""
    machine, accelerator = journal(monkeypatch, scheduler="gpu_only", cache_size="all")
    launch, count = accelerator.launch, 0

    def every_second(*given: Any, site: str, **named: Any) -> None:
        nonlocal count
        count += site == "experts"
        if site == "experts" and count % 2:
            raise RuntimeError("every second launch")
        launch(*given, site=site, **named)

    monkeypatch.setattr(accelerator, "launch", every_second)
    machine.play(*[1] * 20)
    health = machine.runtime.health()
    assert health.accelerators[accelerator.name].given_up and health.word == "abandoned"
    assert health.accelerators[accelerator.name].failed_steps == 8
    assert health.accelerators[accelerator.name].last_failure == "every second launch"
    assert machine.runtime.accelerators == ()


def test_a_failure_now_and_then_is_forgiven(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = make(monkeypatch, 0)
    lane = machine.runtime.lanes[0]
    for _ in range(100):
        assert not lane.note_failure()
        for _ in range(20):
            lane.note_success()
    assert not lane.note_failure() and not lane.note_failure() and lane.note_failure(), "three in a row are too many"


@pytest.mark.parametrize(("spin_s", "sleeps"), [(0.0, True), (10.0, False)])
def test_polling_sleeps_only_where_no_core_is_to_spare(
    monkeypatch: pytest.MonkeyPatch, spin_s: float, sleeps: bool
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(waiting.time, "sleep", slept.append)
    polls = iter([False] * 200 + [True] * 2)
    Deadline(60.0, spin_s).wait(lambda: next(polls), "something")
    assert bool(slept) == sleeps


def test_a_wait_of_known_length_sleeps_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a core is to spare: the experts' threads may want it."""
    end = time.perf_counter() + 0.02
    slept: list[float] = []
    sleep = time.sleep

    def note(seconds: float) -> None:
        began = time.perf_counter()
        sleep(seconds)
        slept.append(time.perf_counter() - began)  # on a busy machine more than was asked for

    monkeypatch.setattr(waiting.time, "sleep", note)
    Deadline(60.0, waiting.SPIN_S).wait(lambda: time.perf_counter() > end, "something", rest_s=0.01)
    assert slept and sum(slept) >= 0.009


def test_a_small_machine_has_no_core_to_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    for number, wanted in ((2, False), (4, False), (16, True)):
        monkeypatch.setattr(cores, "physical_cores", lambda number=number: number)
        assert cores.has_core_to_spare() == wanted


@pytest.mark.parametrize(
    ("raised", "wanted"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), CapacityError),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), RuntimeError),
    ],
)
def test_only_a_lack_of_memory_asks_for_a_smaller_cache(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, wanted: type[Exception]
) -> None:
    """A dead context is no question of size, and shrinking would not help it."""

    def fail(*_: Any, **__: Any) -> None:
        raise raised

    accelerator = object.__new__(TorchAccelerator)
    accelerator.device = torch.device("cuda", 0)
    monkeypatch.setattr(torch, "empty", fail)
    with pytest.raises(wanted) as caught:
        accelerator.allocate(1000)
    assert ("smaller cache_size" in str(caught.value)) == (wanted is CapacityError)


def test_a_cache_shrinks_for_somebody_else_s_sake(monkeypatch: pytest.MonkeyPatch) -> None:
    """All memory is given back before any is taken again, so that what is free is one piece."""
    machine, accelerator = journal(monkeypatch, cache_size=4)
    machine.play(1, 3)
    order: list[str] = []
    for name in ("allocate", "release"):
        call = getattr(accelerator, name)
        monkeypatch.setattr(accelerator, name, lambda given, name=name, call=call: (order.append(name), call(given))[1])
    assert machine.runtime.make_room(torch.OutOfMemoryError("in attention"))
    assert order == ["release"] * LAYERS + ["allocate"] * LAYERS
    assert machine.runtime.num_slots == 3 * LAYERS
    machine.runtime.coordinator.check_integrity()
    machine.play(1, 3)
    health = machine.runtime.health()
    assert health.word == "shrunk" and health.accelerators[accelerator.name].shrunk == 1
    assert machine.num_failures == 0
    for _ in range(4):
        machine.runtime.make_room(torch.OutOfMemoryError("in attention"))
    assert machine.runtime.num_slots == 0
    assert not machine.runtime.make_room(torch.OutOfMemoryError("in attention")), "nothing is left to give"
    machine.play(1)


def test_no_memory_for_the_workspace_is_told_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` may have filled the card by then."""

    def prepare(self: object, max_tokens: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TorchReferenceGpu, "prepare", prepare)
    with pytest.raises(CapacityError, match=r"emulated:0 has no memory left .* larger reserve_bytes"):
        make(monkeypatch, 0, accelerator=JournalAccelerator())
