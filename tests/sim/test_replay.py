"""Replay drives a coordinator as a host does: same trace, same decisions, and its numbers fit together."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from hybrimoe_kt.core.timeline import Span
from hybrimoe_kt.errors import ConfigError
from hybrimoe_kt.sim.compare import simulate
from hybrimoe_kt.sim.machine import Machine
from hybrimoe_kt.sim.replay import decisions, drive, perfect_look_ahead
from hybrimoe_kt.sim.scenario import METHODS, Method, Scenario, make_coordinator, recorded, synthetic
from hybrimoe_kt.sim.trace_file import read_trace, write_trace

TRACES = Path(__file__).parents[1] / "data" / "traces"


@pytest.fixture(scope="module")
def scenario() -> Scenario:
    return synthetic("deepseek-v2-lite", "default", "25%", prompt_tokens=32, tokens=10)


def test_same_trace_same_decisions(scenario: Scenario, tmp_path: Path) -> None:
    first, second = scenario.run(METHODS["default"]), scenario.run(METHODS["default"])
    assert first.digest == second.digest
    assert first.phases["decode"].seconds == second.phases["decode"].seconds
    saved = read_trace(write_trace(scenario.trace, tmp_path / "trace"))
    again = Scenario(saved, scenario.profile, scenario.num_slots, scenario.model, scenario.warmup)
    assert again.run(METHODS["default"]).digest == first.digest, "a trace file decides as the trace it was written from"


def test_decisions_do_not_depend_on_hash_seed_or_process() -> None:
    code = (
        "from hybrimoe_kt.sim.scenario import METHODS, recorded\n"
        f"run = recorded({str(TRACES / 'gemma4-26b-a4b.npz')!r}, 'default', '25%', tokens=4).run(METHODS['default'])\n"
        "print(run.digest)"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("0", "1")
    }
    assert len(digests) == 1


def test_noise_changes_times_but_no_decision(scenario: Scenario) -> None:
    calm, noisy = scenario.run(METHODS["default"]), scenario.run(METHODS["default"], noise=0.3, seed=5)
    assert calm.digest == noisy.digest
    assert calm.phases["decode"].seconds != noisy.phases["decode"].seconds


def test_decisions_lists_every_plan(scenario: Scenario) -> None:
    specs, costs = scenario.specs(METHODS["paper"]), scenario.costs()
    plans = decisions(scenario.trace, make_coordinator(specs, costs, METHODS["paper"], scenario))
    assert len(plans) == len(scenario.trace.steps) * len(scenario.trace.layers)
    for plan, step in zip(plans[:: len(scenario.trace.layers)], scenario.trace.steps, strict=True):
        assert sorted((*plan.cpu, *plan.gpu)) == sorted(scenario.trace.routing(step, 0).loads)


@pytest.mark.parametrize("name", METHODS)
def test_each_resource_does_one_thing_at_a_time(scenario: Scenario, name: str) -> None:
    spans: list[Span] = []
    scenario.run(METHODS[name], on_span=spans.append)
    for kind in ("cpu", "gpu", "link"):
        mine = sorted((span.start_s, span.end_s) for span in spans if span.kind == kind)
        overlaps = [(a, b) for a, b in pairwise(mine) if b[0] < a[1] - 1e-12]
        assert not overlaps, f"{kind}: {overlaps[:1]}"


def test_warmup_is_served_but_not_measured(scenario: Scenario) -> None:
    run = scenario.run(METHODS["default"])
    assert len(run.phases["prefill"].seconds) == 1
    assert len(run.phases["decode"].seconds) == 10
    assert scenario.warmup == sum(step.request == 0 for step in scenario.trace.steps)


def test_progress_counts_every_step(scenario: Scenario) -> None:
    counted: list[int] = []
    scenario.run(METHODS["static"], progress=counted.append)
    assert sum(counted) == len(scenario.trace.steps)


def test_static_never_moves_an_expert(scenario: Scenario) -> None:
    run = scenario.run(METHODS["static"])
    assert run.phases["decode"].moved_bytes == run.phases["prefill"].moved_bytes == 0
    assert run.phases["decode"].hit_rate == pytest.approx(0.25, abs=0.1)


def test_layer_split_spends_the_cache_on_whole_layers(scenario: Scenario) -> None:
    slots = [spec.num_slots for spec in scenario.specs(METHODS["llama.cpp"])]
    assert set(slots) == {0, 64}
    assert sum(slots) == pytest.approx(0.25 * 64 * 26, abs=64)


def test_perfect_look_ahead_crosses_steps_and_stops_at_the_end(scenario: Scenario) -> None:
    trace = scenario.trace
    last = len(trace.layers) - 1
    step, following = trace.steps[3], trace.steps[4]
    assert perfect_look_ahead(trace, step, last, 2) == [trace.routing(following, 0), trace.routing(following, 1)]
    assert perfect_look_ahead(trace, trace.steps[-1], last, 2) == []


def test_report_relates_method_static_and_oracle(scenario: Scenario) -> None:
    report = simulate(scenario, METHODS["default"])
    assert report["decode_speedup_over_static"] == pytest.approx(report["static"]["token_s"] / report["token_s"])
    assert report["decode_oracle_fraction"] == pytest.approx(report["oracle"]["token_s"] / report["token_s"])
    assert report["decode_bound_s"] <= report["token_s"] <= report["static"]["token_s"]
    assert report["synthetic"]
    static = simulate(scenario, METHODS["static"])
    assert static["prefill_speedup_over_static"] == static["decode_speedup_over_static"] == 1.0


@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "gemma4-26b-a4b"])
def test_recorded_traces_replay_and_gain(name: str) -> None:
    report = simulate(recorded(str(TRACES / f"{name}.npz"), "default", "25%", tokens=8), METHODS["default"])
    assert not report["synthetic"]
    assert report["decode_speedup_over_static"] > 1
    assert report["hit_rate"] > 0.25


def test_a_recorded_trace_takes_its_models_costs() -> None:
    file = str(TRACES / "qwen3-30b-a3b.npz")
    bare, full = (
        recorded(file, "default", "25%", tokens=1),
        recorded(file, "default", "25%", model="qwen3-30b-a3b", tokens=1),
    )
    assert full.run(METHODS["static"]).token_s > bare.run(METHODS["static"]).token_s
    with pytest.raises(ConfigError, match="does not fit mixtral-8x7b"):
        recorded(file, "default", "25%", model="mixtral-8x7b")


@pytest.mark.parametrize(
    ("cache", "words"),
    [("0%", "leaves no slot"), ("1%", "leaves no slot"), (0, "leaves no slot"), (65, "larger than the model"),
     ("9999GiB", "larger than the model"), ("auto", "needs a machine"), ("150%", "150%"), ("lots", "lots")],
)  # fmt: skip
def test_impossible_caches_are_refused(cache: str | int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        synthetic("deepseek-v2-lite", "default", cache, prompt_tokens=1, tokens=1)


def test_unknown_predictor_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'stale_gate'"):
        Method(prefetch="stale_gates")


@pytest.mark.parametrize("scheduler", ["balanced", "paper", "fiddler", "gpu_only", "static"])
@pytest.mark.parametrize("cache", [4, 16, 48])
def test_machine_and_plan_agree_where_nothing_disturbs(scheduler: str, cache: int) -> None:
    """Without prefetches, noise and contention a layer takes what its plan predicted, or less where the plan gave a
    resident expert to the CPU and so freed a slot that its prediction did not count on."""
    scenario = synthetic("deepseek-v2-lite", "a6000-xeon5220r", cache, prompt_tokens=64, tokens=4)
    method = Method(scheduler, "lru", "off")
    specs, costs = scenario.specs(method), scenario.costs()
    machine = Machine({spec.layer: spec for spec in specs}, costs)
    for decision in drive(scenario.trace, make_coordinator(specs, costs, method, scenario)):
        machine.run_dense(costs[decision.plan.layer].between_layers_s[decision.step.num_tokens], "dense")
        seconds = machine.run_layer(decision.plan, (), decision.routing)
        assert seconds <= decision.plan.makespan_s * (1 + 1e-9)
        if len(decision.plan.gpu) >= decision.plan.num_hits + len(decision.plan.transfers):
            assert seconds == pytest.approx(decision.plan.makespan_s, rel=1e-9)


@pytest.mark.parametrize("model", ["mixtral-8x7b", "deepseek-v2-lite"])
@pytest.mark.parametrize("scheduler", ["balanced", "paper"])
def test_prefetching_is_never_slower_than_none(model: str, scheduler: str) -> None:
    """It switches itself off where it does not pay, and must not where it does."""
    scenario = synthetic(model, "a6000-xeon5220r", "50%", prompt_tokens=32, tokens=24)
    on = scenario.run(Method(scheduler, "mrs", "stale_gate", prefetch_size=4)).token_s
    off = scenario.run(Method(scheduler, "mrs", "off")).token_s
    assert on <= off * 1.02


def test_prefetching_pays_where_transfers_are_long() -> None:
    scenario = synthetic("mixtral-8x7b", "a6000-xeon5220r", "50%", prompt_tokens=32, tokens=24)
    on = scenario.run(Method("paper", "mrs", "stale_gate", prefetch_size=4)).token_s
    assert on < 0.9 * scenario.run(Method("paper", "mrs", "off")).token_s


@pytest.mark.parametrize(
    ("hardware", "name"),
    [
        ("a6000-xeon5220r", "qwen3-30b-a3b"),
        ("rtx4090-cpu16", "gemma4-26b-a4b"),
        pytest.param("rtx3090-cpu8", "qwen3-30b-a3b", marks=pytest.mark.slow),
        pytest.param("rtx3090-cpu8", "gemma4-26b-a4b", marks=pytest.mark.slow),
    ],
)
def test_a_device_decides_as_well_as_the_host_and_better_than_others(name: str, hardware: str) -> None:
    """To a hundredth in time and hits, and in time better on the mean than FreeToken's rule and the paper's greedy."""
    over: dict[str, list[float]] = {"freetoken": [], "paper": []}
    for ratio in ("12.5%", "50%"):
        scenario = recorded(str(TRACES / f"{name}.npz"), hardware, ratio, tokens=32)
        runs = {method: scenario.run(METHODS[method]) for method in ("host", "device", *over)}
        device, host = runs["device"], runs["host"]
        assert device.token_s == pytest.approx(host.token_s, rel=0.01)
        assert device.phases["decode"].hit_rate == pytest.approx(host.phases["decode"].hit_rate, rel=0.01)
        for method, gains in over.items():
            gains.append(runs[method].token_s / device.token_s)
    assert all(sum(gains) > len(gains) for gains in over.values()), over


@pytest.mark.parametrize("model", [pytest.param("qwen3-30b-a3b", marks=pytest.mark.slow), "deepseek-v2-lite"])
def test_a_device_looks_ahead_and_goes_on_after_prompts(model: str) -> None:
    """Generated traces have prompts and gates' guesses."""
    scenario = synthetic(model, "rtx4090-cpu16", "25%", prompt_tokens=32, tokens=24)
    runs = {method: scenario.run(METHODS[method]) for method in ("host", "device")}
    device, host = runs["device"], runs["host"]
    assert device.phases["prefill"].mean_s == pytest.approx(host.phases["prefill"].mean_s, rel=0.05)
    assert device.token_s == pytest.approx(host.token_s, rel=0.05)
    assert device.phases["decode"].num_prefetches and device.stats["num_prefetches"]
