"""A run's timeline says what its plans said, on every kind of accelerator."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrimoe_kt.core.timeline import Timeline
from hybrimoe_kt.engine.build import build_engine
from hybrimoe_kt.engine.engine import Engine, Sampling
from hybrimoe_kt.sim.timeline import read_timeline, write_timeline
from tests.support.generated_model import GeneratedModel, Shape
from tests.support.timelines import arrivals_before_use, check, read

LANES = {"steps", "scheduler", "GPU 0", "CPU", "link 0"}
Build = Callable[..., Engine]


@pytest.fixture
def build(generated: Callable[[Shape], GeneratedModel]) -> Build:
    def make(accelerator: str, **options: Any) -> Engine:
        model = generated(Shape(layers=4, experts=16, top_k=4))
        given = {
            "accelerator": accelerator, "cache_size": 8, "cpu_backend": "torch_reference", "prefetch_size": 2,
            "transfer_chunk_bytes": 16384, "profile": "a6000-xeon5220r", "fallback": False,
        }  # fmt: skip
        engine = build_engine(model.path, progress=False, option_overrides=given | options)
        engine.end_ids = set()
        return engine

    return make


def run(engine: Engine, file: Path, capacity: int | None = None, tokens: int = 16) -> None:
    timeline = Timeline(model="generated") if capacity is None else Timeline(capacity, model="generated")
    engine.runtime.record_timeline(timeline)
    list(engine.tokens(list(range(11, 25)), Sampling(max_new_tokens=tokens, temperature=0)))
    finished = engine.runtime.finish_timeline()
    assert finished is timeline
    write_timeline(timeline, file)


@pytest.mark.parametrize("accelerator", ["emulated", "emulated:timed:a6000-xeon5220r", "emulated:adversarial:3"])
@pytest.mark.parametrize("scheduler", ["balanced", "gpu_only"])
def test_what_ran_is_what_was_planned(build: Build, tmp_path: Path, accelerator: str, scheduler: str) -> None:
    engine = build(accelerator, scheduler=scheduler)
    assert engine.runtime.coordinator is not None
    before = engine.runtime.coordinator.stats.num_transfers
    file = tmp_path / "run.json"
    run(engine, file)
    lanes = check(file, LANES if scheduler == "balanced" else LANES - {"CPU"})
    steps = [(event["args"]["step"], event["name"]) for event in lanes["steps"]]
    assert steps == [(0, "prefill 14"), *((number, "decode 1") for number in range(1, 16))]
    on_demand = [event["args"] for event in lanes["link 0"] if event["args"]["work"] == "on_demand"]
    arrived = sum(args["piece"] == args["pieces"] for args in on_demand)
    assert arrived == engine.runtime.coordinator.stats.num_transfers - before
    prefetched = [event["args"] for event in lanes["link 0"] if event["args"]["work"] == "prefetch"]
    assert any(args["pieces"] > 1 for args in prefetched)


def test_without_an_accelerator_everything_is_the_cpu_s(build: Build, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    run(build("none"), file)
    lanes = check(file, {"steps", "scheduler", "CPU"})
    assert len(lanes["CPU"]) == 4 * 16


def test_the_file_says_how_it_knows_the_time(build: Build, tmp_path: Path) -> None:
    for accelerator, words in (("emulated", "done when it is given"), ("emulated:timed:h100-cpu64", "computed from")):
        file = tmp_path / "run.json"
        run(build(accelerator), file, tokens=2)
        _, other = read(file)
        assert words in next(text for name, text in other.items() if name.startswith("GPU 0"))
        assert "host clock" in other["CPU"] and "run" in other["origin"]


def test_it_stops_between_plans_when_full_and_says_so(build: Build, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    run(build("emulated"), file, capacity=400)
    lanes = check(file, LANES)
    assert sum(map(len, lanes.values())) <= 400
    assert "only the beginning is kept" in read(file)[1]["note"]


def test_nothing_is_written_down_unless_asked_for(build: Build) -> None:
    engine = build("emulated")
    list(engine.tokens([11, 12], Sampling(max_new_tokens=2, temperature=0)))
    assert engine.runtime.finish_timeline() is None


def test_a_written_timeline_reads_back_the_same(build: Build, tmp_path: Path) -> None:
    file, again = tmp_path / "run.json", tmp_path / "again.json"
    run(build("emulated"), file, tokens=2)
    write_timeline(read_timeline(file), again)
    assert again.read_text(encoding="utf-8") == file.read_text(encoding="utf-8")


def _lose_an_expert(events: list[dict[str, Any]]) -> None:
    next(event for event in events if event.get("cat") == "cpu")["args"]["experts"].pop()


def _lose_a_transfer(events: list[dict[str, Any]]) -> None:
    events.remove(next(event for event in reversed(events) if event.get("args", {}).get("work") == "on_demand"))


def _use_early(events: list[dict[str, Any]]) -> None:
    arrival = next(event for event in events if event.get("args", {}).get("work") == "on_demand")
    use = next(
        event
        for event in events
        if event.get("cat") == "gpu"
        and (event["args"]["plan"], event["args"]["experts"]) == (arrival["args"]["plan"], arrival["args"]["experts"])
    )
    plan = next(e for e in events if e.get("cat") == "scheduler" and e["args"]["plan"] == arrival["args"]["plan"])
    use["ts"], use["dur"] = plan["ts"], 0.0


def _overlap(events: list[dict[str, Any]]) -> None:
    next(event for event in events if event.get("cat") == "cpu")["dur"] += 1e9


@pytest.mark.parametrize("spoil", [_lose_an_expert, _lose_a_transfer, _use_early, _overlap], ids=lambda f: f.__name__)
def test_these_checks_can_fail(build: Build, tmp_path: Path, spoil: Callable[[list[dict[str, Any]]], None]) -> None:
    file = tmp_path / "run.json"
    run(build("emulated:timed:a6000-xeon5220r"), file, tokens=4)
    data = json.loads(file.read_text(encoding="utf-8"))
    spoil(data["traceEvents"])
    file.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(AssertionError):
        check(file, LANES)


@pytest.mark.parametrize(("clocks_us", "is_right"), [(0.002, False), (25.0, False), (100.0, True)])
def test_clocks_may_contradict_each_other_by_so_much(clocks_us: float, is_right: bool) -> None:
    """An expert used 30 us before it is there."""
    about = {"layer": 0, "experts": [3], "plan": 1}
    link, gpu = {"ts": 10.0, "dur": 40.0, "args": about}, {"ts": 20.0, "dur": 5.0, "args": about}
    with contextlib.nullcontext() if is_right else pytest.raises(AssertionError, match="used before"):
        arrivals_before_use([gpu], [link], clocks_us)


@pytest.mark.gpu
@pytest.mark.skipif(
    not (torch.cuda.is_available() or torch.xpu.is_available()), reason="needs a CUDA, HIP or XPU device"
)
def test_on_a_device_its_own_events_tell_the_time(build: Build, tmp_path: Path) -> None:
    device = "cuda" if torch.cuda.is_available() else "xpu"
    file = tmp_path / "run.json"
    run(build(device, cpu_backend="torch_reference", gpu_backend="torch_reference"), file)
    # The device's clock is tied to the host's by one synchronisation, late by tens of microseconds, and counts
    # milliseconds in single precision, 2 us of the 20 s after which it is tied anew.
    check(file, LANES, clocks_us=100.0)
    _, other = read(file)
    assert other[f"GPU 0, link 0 ({device})"] == "events of the device"
