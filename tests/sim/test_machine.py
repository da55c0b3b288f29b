"""The simulated machine against schedules small enough to work out by hand."""

from __future__ import annotations

import pytest

from hybrimoe_kt.core.cost import CostModel
from hybrimoe_kt.core.timeline import Span, Timeline
from hybrimoe_kt.core.types import ExpertId, LayerSpec, Plan, Routing, Transfer
from hybrimoe_kt.sim.machine import Machine
from hybrimoe_kt.sim.timeline import chrome_trace

GPU_S, CPU_S, LINK_S, SHARED_S = 1.0, 3.0, 2.0, 0.5


def make_machine(slowdown: float = 1.0, **options: object) -> tuple[Machine, list[Span]]:
    cost = CostModel(
        cpu=lambda load: CPU_S * load,
        gpu=lambda load: GPU_S,
        cpu_slowdown=slowdown,
        link_bytes_per_s=100 / LINK_S,
        expert_bytes=100,
        shared_expert_s=SHARED_S,
    )
    spans: list[Span] = []
    specs = {layer: LayerSpec(layer, 8, 4, 100, num_slots=4) for layer in (0, 1)}
    return Machine(specs, {0: cost, 1: cost}, on_span=spans.append, **options), spans  # type: ignore[arg-type]


def routing(*experts: int, load: int = 1) -> Routing:
    return Routing(0, dict.fromkeys(experts, load))


def copy(expert: int, slot: int, layer: int = 0, evicted: int | None = None, kind: str = "on_demand") -> Transfer:
    old = None if evicted is None else ExpertId(layer, evicted)
    return Transfer(ExpertId(layer, expert), slot, 100, kind, old)  # type: ignore[arg-type]


def test_resources_run_side_by_side() -> None:
    machine, spans = make_machine()
    plan = Plan(0, cpu=(3,), gpu=(1, 2), slots={1: 0, 2: 1})
    assert machine.run_layer(plan, (), routing(1, 2, 3)) == pytest.approx(CPU_S)
    assert {(s.kind, s.start_s, s.end_s) for s in spans} == {
        ("gpu", 0.0, 0.5), ("gpu", 0.5, 1.5), ("gpu", 1.5, 2.5), ("cpu", 0.0, 3.0)
    }  # fmt: skip
    assert (machine.busy.cpu, machine.busy.gpu, machine.busy.link) == (3.0, 2.5, 0.0)


def test_transfers_queue_and_the_gpu_waits_for_each() -> None:
    machine, spans = make_machine()
    plan = Plan(0, cpu=(), gpu=(1, 2, 3), transfers=(copy(2, 1), copy(3, 2)), slots={1: 0, 2: 1, 3: 2})
    assert machine.run_layer(plan, (), routing(1, 2, 3)) == pytest.approx(2 * LINK_S + GPU_S)
    machine.finish()
    assert [(s.start_s, s.end_s) for s in spans if s.kind == "link"] == [(0.0, 2.0), (2.0, 4.0)]
    assert [(s.start_s, s.end_s) for s in spans if s.kind == "gpu"][1:] == [(0.5, 1.5), (2.0, 3.0), (4.0, 5.0)]


def test_a_slot_is_overwritten_only_after_its_last_reader() -> None:
    machine, spans = make_machine()
    plan = Plan(0, cpu=(), gpu=(1, 2), transfers=(copy(2, 0, evicted=1),), slots={1: 0, 2: 0})
    machine.run_layer(plan, (), routing(1, 2))
    machine.finish()
    (link,) = (span for span in spans if span.kind == "link")
    assert link.start_s == pytest.approx(SHARED_S + GPU_S)
    assert machine.now_s == pytest.approx(SHARED_S + GPU_S + LINK_S + GPU_S)


def test_prefetches_go_behind_the_layers_own_transfers_and_run_on() -> None:
    machine, _ = make_machine()
    first = Plan(0, cpu=(), gpu=(1,), transfers=(copy(1, 0),), slots={1: 0})
    machine.run_layer(first, (copy(5, 0, layer=1, kind="prefetch"),), routing(1))
    assert machine.now_s == pytest.approx(LINK_S + GPU_S)
    machine.run_dense(0.25, "dense")
    second = Plan(1, cpu=(), gpu=(5,), slots={5: 0})
    machine.run_layer(second, (), Routing(1, {5: 1}))
    assert machine.now_s == pytest.approx(2 * LINK_S + GPU_S), "the copy landed at 4 s, the layer began at 3.25 s"


def test_a_busy_link_slows_the_cpu_only_while_it_lasts() -> None:
    machine, spans = make_machine(slowdown=2.0)
    plan = Plan(0, cpu=(3,), gpu=(1,), transfers=(copy(1, 0),), slots={1: 0})
    machine.run_layer(plan, (), routing(1, 3))
    (cpu,) = (span for span in spans if span.kind == "cpu")
    assert cpu.end_s == pytest.approx(4.0), "2 s at half speed do 1 s of work, 2 s at full speed the rest"
    machine.run_layer(Plan(0, cpu=(3,)), (), routing(3))
    assert machine.now_s == pytest.approx(7.0)


def test_noise_moves_the_cpu_and_nothing_else() -> None:
    plan = Plan(0, cpu=(3,), gpu=(1,), slots={1: 0})
    ends = []
    for seed in (1, 1, 2):
        machine, spans = make_machine(noise=0.3, seed=seed)
        machine.run_layer(plan, (), routing(1, 3))
        ends.append(machine.now_s)
        assert [s.end_s for s in spans if s.kind == "gpu"] == [0.5, 1.5]
    assert ends[0] == ends[1] != ends[2]


def test_timeline_has_one_row_per_resource() -> None:
    machine, spans = make_machine()
    plan = Plan(0, cpu=(3,), gpu=(1,), transfers=(copy(1, 0),), slots={1: 0})
    machine.run_layer(plan, (), routing(1, 3))
    machine.finish()
    timeline = Timeline()
    timeline.spans = spans
    events = chrome_trace(timeline)["traceEvents"]
    assert isinstance(events, list)
    names = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert names == {"GPU 0", "CPU", "link 0"}
    link = next(event for event in events if event.get("cat") == "link")
    assert (link["ts"], link["dur"], link["name"]) == (0.0, 2e6, "L0 E1 on_demand")


def test_an_aborted_copy_is_skipped_unless_it_has_begun() -> None:
    for time_s, ends in ((1.0, [2.0, 4.0, 6.0]), (0.0, [2.0, 4.0])):
        machine, spans = make_machine()
        first, second, third = (copy(expert, slot, layer=1, kind="prefetch") for slot, expert in enumerate((5, 6, 7)))
        machine.run_layer(Plan(0, cpu=()), (first, second), Routing(0, {}))
        machine.now_s = 2.5 if time_s else 1.0
        machine.run_layer(Plan(1, cpu=()), (third,), Routing(1, {}), aborted=(second,))
        machine.finish()
        assert [s.end_s for s in spans if s.kind == "link"] == ends
