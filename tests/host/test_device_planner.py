"""Tokens that a device plans: one replay each, with the bits of those that the host plans, and what is left behind."""

from __future__ import annotations

import gc
import logging
import threading
from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch

from hybrimoe_kt.config import ExpertOptions
from hybrimoe_kt.core.device_coordinator import DeviceTables, as_plan, as_transfer, rules_of
from hybrimoe_kt.core.device_rules import Guess, look_ahead, plan_step, shares_of
from hybrimoe_kt.core.timeline import Timeline
from hybrimoe_kt.device.step_graph import listeners
from hybrimoe_kt.engine.token_generator import TokenGenerator
from hybrimoe_kt.errors import ConfigError
from hybrimoe_kt.runtime import ModelExperts, Runtime
from hybrimoe_kt.runtime.device_planner import DevicePlanner
from hybrimoe_kt.runtime.planned_steps import PlannedStep
from hybrimoe_kt.runtime.runtime import assemble
from tests.support.captured_steps import PROMPT, Make, decode, generator, load, loop_of

from .test_equality import SHAPES

pytestmark = pytest.mark.usefixtures("little_room", "one_thread")

DEVICE: dict[str, Any] = {"planner": "device"}
QUICK = {("qwen3moe", 0.5)}


def planner_of(made: TokenGenerator) -> DevicePlanner:
    planner = made.runtime.device_planner
    assert planner is not None
    return planner


def check(made: TokenGenerator) -> None:
    """Slots are unique, and hold what the tables say: the bytes of those experts."""
    planner = planner_of(made)
    planner.give_back()
    runtime = made.runtime
    runtime.coordinator.check_integrity()
    for layer, slots in runtime.lanes[0].pool.layers.items():
        for expert, slot in enumerate(runtime.coordinator.slots_of(layer)):
            if slot >= 0:
                wanted = torch.empty_like(slots.views[slot])
                layout = runtime.store.layouts[layer]
                layout.write([part.clone() for part in runtime.store.layers[layer].parts(expert)], wanted)
                assert torch.equal(slots.views[slot], wanted), f"layer {layer}, expert {expert}"


@pytest.mark.parametrize(
    ("name", "share"),
    [
        pytest.param(name, share, marks=() if (name, share) in QUICK else pytest.mark.slow)
        for name in ("qwen3moe", "deepseek2", "qwen2moe", "qwen3next")
        for share in (0.5, 0.75)
    ],
)
def test_tokens_are_those_that_the_host_plans(generated: Make, name: str, share: float) -> None:
    model = generated(SHAPES[name])
    wanted = decode(generator(load(model, cache_size=share), captures=True), 30)
    made = generator(load(model, cache_size=share, **DEVICE), captures=True)
    found = decode(made, 30)
    assert torch.equal(found, wanted)
    pieces = loop_of(made).captured.pieces
    assert pieces is not None and pieces.num_pieces == 1, "a token is one replay"
    planner = planner_of(made)
    assert planner.num_steps > 20
    counted = made.runtime.statistics()
    assert counted["experts_on_cpu"] and counted["experts_on_gpu"] and counted["hits"] and counted["misses"]
    check(made)


@pytest.mark.parametrize(
    "options",
    [
        {"policy": "lru", "prefetch_size": 0}, {"scheduler": "paper", "host_store": "page_locked"},
        *(
            pytest.param(options, marks=pytest.mark.slow)
            for options in (
                {"policy": "mrs", "policy_options": {"alpha": 0.3}}, {"prefetch_size": 4, "prefetch_depth": 1},
                {"scheduler": "gpu_only"}, {"scheduler": "cpu_only"}, {"scheduler": "static"}, {"scheduler": "fiddler"},
            )
        ),
    ],
    ids=str,
)  # fmt: skip
def test_whatever_is_chosen_answers_are_the_same(generated: Make, options: dict[str, Any]) -> None:
    model = generated(SHAPES["qwen3moe"])
    wanted = decode(generator(load(model), captures=True), 16)
    made = generator(load(model, **DEVICE, **options), captures=True)
    assert torch.equal(decode(made, 16), wanted)
    assert planner_of(made).num_steps > 10
    check(made)


def test_prompts_come_between(generated: Make) -> None:
    """The host plans them, and each goes on from what the other has left."""
    model, answers = generated(SHAPES["deepseek2"]), []
    for options in ({}, DEVICE):
        made = generator(load(model, **options), captures=True)
        answers.append([])
        for text in ([*PROMPT], [*PROMPT[:7], 3, 4], [9, 8, 7], [*range(40, 90)]):
            cached = made.go_on_from(text)
            answers[-1].append(decode(made, 6, text[cached:]))
            if options:
                check(made)
    for wanted, found in zip(*answers, strict=True):
        assert torch.equal(wanted, found)


def test_it_says_what_it_has_decided(generated: Make) -> None:
    """Every plan of a token is one that the reference makes of the same routing in the same state."""
    model, plans = generated(SHAPES["qwen3moe"]), []
    loaded = load(
        model, **DEVICE, assemble=partial(assemble, on_plan=lambda plan, routing: plans.append((plan, routing)))
    )
    made = generator(loaded, captures=True)
    runtime = loaded.runtime
    made.append(PROMPT)
    rules, tables = rules_of(runtime.options.strategy), DeviceTables(runtime.coordinator.scheduler)
    states = {layer: runtime.coordinator.hand_over(layer) for layer in runtime.store.layers}
    known = {spec.layer: (spec, *tables.of(cost, spec.top_k)) for spec, cost in runtime.coordinator.layers()}
    del plans[:]
    steps: list[PlannedStep] = []
    note = runtime.note_planned
    runtime.note_planned = lambda found, began: (steps.extend(found), note(found, began))  # type: ignore[method-assign]
    token = 5
    for _ in range(12):
        token = int(made.append([token]).argmax())
    assert [plan for plan, _ in plans] == [step.plan for step in steps] and len(steps) == 12 * len(states)
    num_ahead = 0
    for step in steps:
        spec, table, _ = known[step.plan.layer]
        state, routing = states[spec.layer], step.routing
        assert routing.scores is not None
        planned = plan_step(state, rules, table, list(routing.loads), shares_of(routing.scores))
        assert as_plan(spec, planned, table, state.issued) == step.plan
        for copy in planned.copies:
            state.land(copy)
        later = [layer for layer in states if layer > spec.layer] if step.guesses is not None else []
        guesses = [
            Guess(states[layer], known[layer][1], known[layer][2], chosen[0])
            for layer, chosen in zip(later, step.guesses.ids.tolist() if step.guesses is not None else [], strict=True)
        ]
        ahead, admitted = look_ahead(state, planned, guesses, rules)
        wanted = [as_transfer(later[place], copy, spec.expert_bytes, "prefetch") for place, copy in ahead]
        wanted += [as_transfer(spec.layer, copy, spec.expert_bytes, "prefetch") for copy in admitted]
        assert list(step.ahead) == wanted, (step, planned, guesses and guesses[0].ids, state.scores)
        num_ahead += len(wanted)
        for place, copy in ahead:
            states[later[place]].land(copy)
        for copy in admitted:
            state.land(copy)
    assert num_ahead, "something was brought ahead of need"
    planner_of(made).give_back()
    for layer, state in states.items():
        assert list(runtime.coordinator.slots_of(layer)) == state.slot_of
        assert runtime.coordinator.hand_over(layer).scores == pytest.approx(state.scores, abs=2)


def test_counters_are_those_of_its_plans(generated: Make) -> None:
    model, plans = generated(SHAPES["qwen3moe"]), []
    loaded = load(model, **DEVICE, assemble=partial(assemble, on_plan=lambda plan, routing: plans.append(plan)))
    made = generator(loaded, captures=True)
    made.append(PROMPT)
    before = loaded.runtime.statistics()
    del plans[:]
    for token in (3, 4, 5, 6, 7):
        made.append([token])
    after = loaded.runtime.statistics()
    grown = {name: after[name] - before[name] for name in before}
    assert grown["num_plans"] == len(plans) == 5 * len(loaded.runtime.store.layers)
    assert grown["hits"] == sum(plan.num_hits for plan in plans)
    assert grown["experts_on_cpu"] == sum(len(plan.cpu) for plan in plans)
    assert grown["experts_on_gpu"] == sum(len(plan.gpu) for plan in plans)
    assert grown["num_transfers"] == sum(len(plan.transfers) for plan in plans)
    assert grown["makespan_s"] == pytest.approx(sum(plan.makespan_s for plan in plans))
    heat = loaded.runtime.coordinator.heat()
    assert sum(map(sum, heat["hits"])) == after["hits"]


def test_a_timeline_and_a_trace_are_written(generated: Make) -> None:
    loaded = load(generated(SHAPES["qwen3moe"]), **DEVICE)
    made, runtime = generator(loaded, captures=True), loaded.runtime
    timeline = Timeline()
    runtime.record_timeline(timeline)
    decode(made, 14)
    spans = runtime.finish_timeline()
    assert spans is not None
    works = Counter((span.kind, span.work) for span in spans.spans)
    assert works["scheduler", "plan"] >= 15 * len(runtime.store.layers) and works["cpu", "experts"]
    assert works["step", "decode"] >= 13 and works["scheduler", "replay"] >= 4
    recorder = Heard()
    runtime.recorder = recorder
    decode(made, 4, [9])
    assert [layer for layer, *_ in recorder.steps][-len(runtime.store.layers) :] == sorted(runtime.store.layers)
    last = recorder.steps[-1]
    assert last[1].shape == last[2].shape and last[3] is not None


class Heard:
    """A recorder that keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[tuple[Any, ...]] = []

    def record(self, *step: Any) -> None:
        self.steps.append(step)


def test_where_all_experts_are_resident_nothing_is_planned(generated: Make) -> None:
    model = generated(SHAPES["qwen3moe"])
    wanted = decode(generator(load(model, cache_size="all"), captures=True), 10)
    made = generator(load(model, cache_size="all", **DEVICE), captures=True)
    assert torch.equal(decode(made, 10), wanted)
    assert not planner_of(made).num_steps


def test_layers_that_are_resident_go_their_own_way_beside_others(generated: Make) -> None:
    """Within the same replay; the planner has the rest."""
    model = generated(SHAPES["deepseek2"])
    options = {"prefetch_size": 0, "scheduler": "gpu_only", "cache_size": 0.5}
    wanted = decode(generator(load(model, **options), captures=True), 12)

    def last_whole(experts: ModelExperts) -> Runtime:
        runtime = assemble(experts)
        layer = max(experts.store.layers)
        runtime.coordinator.resize(layer, 0)
        runtime.lanes[0].resize(layer, 0)
        num_experts = experts.store.layers[layer].num_experts
        runtime.lanes[0].resize(layer, num_experts)
        runtime.coordinator.resize(layer, num_experts)
        runtime._recovery.fill_slots()
        return runtime

    made = generator(load(model, **options, **DEVICE, assemble=last_whole), captures=True)
    assert torch.equal(decode(made, 12), wanted)
    pieces = loop_of(made).captured.pieces
    assert pieces is not None and pieces.num_pieces == 1 and planner_of(made).num_steps > 8
    check(made)
    heat = made.runtime.coordinator.heat()
    made.runtime.statistics()
    assert sum(heat["misses"][-1]) == 0 and sum(heat["misses"][0])


def test_an_unknown_planner_and_a_policy_of_the_hosts(generated: Make) -> None:
    with pytest.raises(ConfigError, match="unknown planner 'gpu'; valid: device, host"):
        ExpertOptions(planner="gpu")
    with pytest.raises(ConfigError, match="keeps experts by mrs or lru, not by 'lfu'"):
        ExpertOptions(planner="device", policy="lfu")
    with pytest.raises(ConfigError, match="looks ahead by predictor stale_gate, not by 'history'"):
        ExpertOptions(planner="device", predictor="history")
    assert ExpertOptions(planner="device").strategy.policy == "mrs"
    assert ExpertOptions().planner == "host", "until a card has shown it"


def test_nothing_answers_any_more_when_a_model_is_gone(generated: Make) -> None:
    def answering() -> int:
        gc.collect()
        return sum(thread.name == "shares of the CPU" for thread in threading.enumerate())

    before = answering()
    made = generator(load(generated(SHAPES["qwen3moe"]), **DEVICE), captures=True)
    decode(made, 4)
    assert answering() == before + 1
    del made
    assert answering() == before


def test_ggml_computes_the_shares(generated: Make) -> None:
    """In the thread that answers, while the kernels of an accelerator would go on."""
    model, options = generated(SHAPES["qwen3moe"]), {"cpu_backend": "ggml", "scheduler": "static"}
    wanted = decode(generator(load(model, **options), captures=True), 12)
    made = generator(load(model, **options, **DEVICE), captures=True)
    found = decode(made, 12)
    torch.testing.assert_close(found, wanted, rtol=0.0, atol=0.05)
    assert planner_of(made).num_steps > 8 and made.runtime.statistics()["experts_on_cpu"]


@pytest.mark.parametrize("prefetch_size", [0, 2])
def test_nothing_is_made_within_a_capture_for_a_layer_that_is_whole_no_more(
    generated: Make, prefetch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, options = generated(SHAPES["qwen3moe"]), {"cache_size": "all", "prefetch_size": prefetch_size}
    wanted = decode(generator(load(model, **options), captures=True), 16)
    made = generator(load(model, **options, **DEVICE), captures=True)
    rows = decode(made, 6)
    begin_step = DevicePlanner.begin_step

    def outside(planner: DevicePlanner) -> None:
        assert not listeners, "a capture has begun"
        begin_step(planner)

    monkeypatch.setattr(DevicePlanner, "begin_step", outside)
    for slot in range(3):
        made.runtime.coordinator.drop(0, slot)
    more = decode(made, 9, [int(rows[-1].argmax())])
    assert torch.equal(torch.cat([rows, more]), wanted)
    assert planner_of(made).num_steps > 6 and loop_of(made).captures
    check(made)


def test_a_layer_that_a_prompt_has_made_whole_is_captured(generated: Make, caplog: pytest.LogCaptureFixture) -> None:
    """No single token has gone through it as such before."""
    model, rows = generated(SHAPES["qwen3moe"]), []
    for options in ({}, DEVICE):
        made = generator(load(model, cache_size="all", scheduler="gpu_only", **options), captures=True)
        rows.append([made.append(PROMPT).clone()])
        made.runtime.coordinator.drop(1, 0)
        with caplog.at_level(logging.WARNING):
            rows[-1] += [made.append(ids).clone() for ids in ([3], [4, 5], [7], [8], [9], [10])]
        assert made.runtime.is_whole(1, 1) and loop_of(made).captures and not caplog.records
    assert torch.equal(torch.stack(rows[0]), torch.stack(rows[1]))


def test_a_trace_after_a_timeline_has_scores(generated: Make) -> None:
    """Though the policy has not wanted them, nor so the timeline."""
    made = generator(load(generated(SHAPES["qwen3moe"]), policy="lru", prefetch_size=0, **DEVICE), captures=True)
    made.runtime.record_timeline(Timeline())
    decode(made, 4)
    made.runtime.finish_timeline()
    made.runtime.recorder = recorder = Heard()
    decode(made, 3, [9])
    assert recorder.steps and all(step[3] is not None for step in recorder.steps)
