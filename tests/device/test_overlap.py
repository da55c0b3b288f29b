"""What runs beside what. A right answer shows none of it: these tests read the order in which work was given."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hybrimoe_kt.backends.gpu_torch import TorchReferenceGpu
from hybrimoe_kt.backends.torch_reference import TorchReferenceCpu
from hybrimoe_kt.core.types import Plan
from hybrimoe_kt.device.emulated.journal import Entry, JournalAccelerator, JournalCpu
from hybrimoe_kt.device.executor import Executor
from hybrimoe_kt.device.host_store import HostStore
from hybrimoe_kt.device.lane import Lane
from hybrimoe_kt.device.torch_accelerator import TorchAccelerator
from hybrimoe_kt.device.transfers import NUM_RING_CHUNKS
from hybrimoe_kt.device.waiting import Deadline

from .machine import EXPERTS, layers, wanted
from .test_executor import EVERYONE, bring, execute, inputs

LAYER, CHUNK_BYTES, NUM_CHUNKS = 1, 2048, 6
"""The layer that plans are for, and in how many pieces its experts are prefetched."""
NUM_SLOTS, NUM_STREAM_SLOTS = 4, 3


class _SlowLink(JournalAccelerator):
    """Marks of the prefetches' stream are reached at the third look only, so that a full window has room later."""

    class Event:
        looks_left = 0

        def is_done(self) -> bool:
            self.looks_left -= 1
            return self.looks_left < 0

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait(self, event: Any, site: str) -> None:
            pass

        def record(self, event: Any, site: str) -> None:
            event.looks_left = 2 if self.name == "prefetch copies" else 0

    def event(self) -> Any:
        return self.Event()

    def stream(self, name: str, *, low_priority: bool = False) -> Any:
        return self.Stream(name)


class Bench:
    """An executor with one accelerator and a CPU, both of which write down what they are given."""

    def __init__(
        self,
        accelerator: JournalAccelerator | None = None,
        *,
        host_store: str = "page_locked",
        num_polls: int = 20,
        streams: bool = False,
    ) -> None:
        self.accelerator = accelerator or JournalAccelerator()
        cpu, deadline, store = JournalCpu(TorchReferenceCpu(), self.accelerator, num_polls), Deadline(60.0), HostStore()
        for experts in layers():
            store.add(experts)
            cpu.add_layer(experts)
        if host_store == "page_locked":
            store.page_lock(self.accelerator, list(store.layers))
        self.lane = Lane(
            self.accelerator, TorchReferenceGpu(), store, dict.fromkeys(store.layers, NUM_SLOTS),
            num_buffer_slots=dict.fromkeys(store.layers, NUM_STREAM_SLOTS) if streams else None,
            max_tokens=8, cpu_answers_pairs=True, chunk_bytes=CHUNK_BYTES, deadline=deadline,
        )  # fmt: skip
        self.executor = Executor(cpu, [self.lane], deadline)

    def play(self, plan: Plan) -> list[Entry]:
        """Run a plan, whose answer must be right; return what was given meanwhile."""
        self.accelerator.entries.clear()
        given = inputs()
        assert torch.equal(execute(self.executor, plan, {}, given), wanted(plan.layer, given))
        return list(self.accelerator.entries)


def plan(slots: dict[int, int], arriving: tuple[int, ...] = ()) -> Plan:
    """A plan of all experts: those in `slots` on the accelerator, in that order, and the others on the CPU."""
    transfers = tuple(bring(expert, slots[expert]) for expert in arriving)
    return Plan(LAYER, tuple(e for e in EVERYONE if e not in slots), tuple(slots), transfers, slots)


def work(entries: list[Entry]) -> list[str]:
    """Launches of experts, copies of experts by their stream, and the CPU's submission and end, in order."""
    names = {"experts": lambda entry: "launch", "CPU experts": lambda entry: entry.kind}
    names["expert copy"] = lambda entry: entry.stream.removesuffix(" copies")
    return [names[entry.site](entry) for entry in entries if entry.site in names]


@pytest.mark.parametrize("streams", [False, True])
def test_one_launch_computes_all_that_are_resident(streams: bool) -> None:
    """Whether they have just been copied or have been there for long; those in lent slots lie in other memory."""
    bench = Bench(streams=streams)
    slots = {6: 2, 1: 0, 4: 3, 3: 1} | ({5: NUM_SLOTS, 7: NUM_SLOTS + 2} if streams else {})
    for expert, slot in slots.items():
        bench.executor.fill(bring(expert, slot))
    for _ in range(2):
        assert work(bench.play(plan(slots))).count("launch") == 1 + streams


@pytest.mark.parametrize("host_store", ["page_locked", "mapped"])
def test_the_resident_are_launched_together_and_before_the_copies(host_store: str) -> None:
    bench = Bench(host_store=host_store)
    for expert, slot in ((1, 0), (4, 3)):
        bench.executor.fill(bring(expert, slot))
    entries = work(bench.play(plan({6: 2, 1: 0, 4: 3, 3: 1}, arriving=(6, 3))))
    assert [entry for entry in entries if entry == "launch"] == ["launch"] * 3
    assert entries.index("launch") < entries.index("on-demand"), "and not after what has yet to arrive"


def test_the_resident_do_not_wait_for_a_prefetch_that_has_not_been_sent() -> None:
    """What still waits on the host has no mark of its own to be looked at: the slot's last one is long reached."""
    bench = Bench()
    for expert, slot in ((1, 0), (4, 3)):
        bench.executor.fill(bring(expert, slot))
    bench.executor.prefetch([bring(6, 2)])
    settled: list[list[str]] = []
    settle = bench.lane.queue.settle
    bench.lane.queue.settle = lambda *place: (settled.append(work(bench.accelerator.entries)), settle(*place))[1]
    entries = work(bench.play(plan({6: 2, 1: 0, 4: 3})))
    assert entries.count("launch") == 2
    assert settled[-1].count("launch") == 1, "compute waits for the prefetch after the resident experts' launch"


def test_links_are_fed_while_the_cpu_computes() -> None:
    """More than the window takes at once: what is left goes out between two looks at the CPU."""
    bench = Bench(_SlowLink())
    bench.executor.prefetch([bring(2, 0, layer=2), bring(3, 0, layer=LAYER)])
    entries = work(bench.play(plan({})))
    assert entries[0] == "submit" and entries[-1] == "done"
    assert entries.count("prefetch") > NUM_RING_CHUNKS


def test_a_link_is_fed_where_the_cpu_has_nothing_to_do() -> None:
    bench = Bench()
    slots = dict(zip(EVERYONE, range(EXPERTS), strict=True))
    bench.executor.prefetch([bring(3, 0, layer=2)])
    whole = Plan(
        LAYER, (), EVERYONE, tuple(bring(e, e % NUM_SLOTS) for e in EVERYONE), {e: e % NUM_SLOTS for e in slots}
    )
    assert "prefetch" in work(bench.play(whole))


def test_nothing_is_sent_once_the_cpu_is_done() -> None:
    """What is sent then would make the next layer's own copies wait."""
    bench = Bench(num_polls=0)
    bench.executor.prefetch([bring(2, 0, layer=2)])
    assert work(bench.play(plan({}))) == ["submit", "done"]


def test_a_prefetch_that_the_plan_needs_goes_before_what_is_brought_on_demand() -> None:
    """All of it: a piece had been sent when the plan came."""
    bench = Bench()
    bench.executor.fill(bring(1, 0))
    bench.executor.prefetch([bring(6, 2), bring(5, 1)])
    queue = bench.lane.queue
    looks = iter([True, False])
    queue.pump(lambda: next(looks))
    entries = work(bench.play(plan({4: 3, 1: 0, 6: 2}, arriving=(4,))))
    first = entries.index("on-demand")
    assert entries[:first].count("prefetch") == NUM_CHUNKS - 1
    assert entries[first + 1 :].count("prefetch") == NUM_CHUNKS, "the other one, while the CPU computes"


def test_waiting_leaves_the_core_to_others() -> None:
    """A thread that polled without sleep would be charged all of the time."""
    began_s, used_s = time.perf_counter(), time.thread_time()
    end_s = began_s + 0.2
    Deadline(5.0).wait(lambda: time.perf_counter() > end_s, "something")
    waited_s, used_s = time.perf_counter() - began_s, time.thread_time() - used_s
    assert waited_s >= 0.2 and used_s < 0.25 * waited_s


@pytest.mark.parametrize(("reserve_bytes", "budget"), [(0, 700), (300, 400), (700, 0), (900, 0)])
def test_an_automatic_budget_keeps_the_reserve(reserve_bytes: int, budget: int) -> None:
    """Free is what the driver has and what torch holds without using it."""
    accelerator = object.__new__(TorchAccelerator)
    accelerator.device = torch.device("cuda", 0)
    accelerator._module = SimpleNamespace(
        mem_get_info=lambda device: (500, 1000),
        memory_reserved=lambda device: 450,
        memory_allocated=lambda device: 250,
    )
    assert accelerator.free_bytes() == 700
    assert accelerator.auto_budget_bytes(reserve_bytes) == budget
