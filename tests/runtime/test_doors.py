"""The two doors of a layer step: what the model computes between `begin` and `finish` runs beside the CPU's experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hybrimoe_kt.backends.torch_reference import TorchReferenceCpu
from hybrimoe_kt.config import ExpertOptions
from hybrimoe_kt.core.types import Plan, Routing
from hybrimoe_kt.device.emulated.journal import JournalAccelerator, JournalCpu
from hybrimoe_kt.device.lane import Lane
from hybrimoe_kt.errors import ConfigError
from hybrimoe_kt.runtime import ModelExperts, Routed, Runtime, assemble
from tests.device.machine import CHUNK, EXPERTS, HIDDEN, LAYERS, TOP_K, layers, wanted


def made(**given: Any) -> tuple[Runtime, JournalAccelerator, list[tuple[Plan, Routing]]]:
    """A runtime of three layers whose accelerator and CPU write into one journal, and the plans it makes."""
    accelerator, plans = JournalAccelerator(), []
    options = {"cpu_backend": "torch_reference", "profile": "default", "cache_size": 3, "max_chunk_tokens": CHUNK}
    experts = ModelExperts(
        ExpertOptions.from_kwargs(options | {"accelerator": "emulated", "scheduler": "static"} | given)
    )
    for layer in layers():
        experts.add(layer)
    runtime = assemble(
        experts,
        cpu=JournalCpu(TorchReferenceCpu(), accelerator),
        accelerators={"emulated": accelerator},
        on_plan=lambda plan, routing: plans.append((plan, routing)),
    )
    accelerator.entries.clear()
    return runtime, accelerator, plans


def step(num_tokens: int, seed: int = 0) -> Routed:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(num_tokens, EXPERTS, generator=generator).argsort(dim=1)[:, :TOP_K]
    weights = torch.rand(num_tokens, TOP_K, generator=generator)
    return Routed(torch.randn(num_tokens, HIDDEN, generator=generator), ids, weights)


@pytest.mark.parametrize("num_tokens", [1, 5, CHUNK, CHUNK + 1, 3 * CHUNK])
@pytest.mark.parametrize("accelerator", ["emulated", "none", "emulated:adversarial:5"])
def test_both_doors_answer_as_the_one(num_tokens: int, accelerator: str) -> None:
    experts = ModelExperts(
        ExpertOptions(accelerator=accelerator, cpu_backend="torch_reference", cache_size=3, max_chunk_tokens=CHUNK)
    )
    for layer in layers():
        experts.add(layer)
    runtime = assemble(experts)
    for number in range(2 * LAYERS):
        layer, routed = number % LAYERS, step(num_tokens, number)
        job = runtime.begin(layer, routed)
        torch.randn(64, 64) @ torch.randn(64, 64)  # the model's own
        assert torch.equal(runtime.finish(job), wanted(layer, (routed.hidden, routed.ids, routed.weights)))
        assert torch.equal(runtime.run(layer, routed), wanted(layer, (routed.hidden, routed.ids, routed.weights)))
    runtime.coordinator.check_integrity()


def test_the_cpu_is_at_work_between_them() -> None:
    """And the accelerator has been given its share: nothing of the step waits for `finish` to start."""
    runtime, accelerator, plans = made()
    job = runtime.begin(1, step(1))
    plan = plans[-1][0]
    assert plan.cpu and plan.gpu, "this step is no hybrid one"
    kinds = [entry.kind for entry in accelerator.entries if entry.site in ("CPU experts", "experts")]
    assert kinds == ["submit", "launch"]
    runtime.finish(job)
    kinds = [entry.kind for entry in accelerator.entries if entry.site in ("CPU experts", "experts")]
    assert kinds == ["submit", "launch", "done"]


def test_a_step_that_is_never_finished_is_abandoned_by_the_next() -> None:
    runtime, _, plans = made(scheduler="gpu_only", prefetch_size=0)
    for seed in range(4):
        runtime.begin(1, step(4, seed))  # the model failed behind it
        routed = step(3, 100 + seed)
        assert torch.equal(runtime.run(1, routed), wanted(1, (routed.hidden, routed.ids, routed.weights)))
        runtime.coordinator.check_integrity()
    assert len(plans) == 8


def test_room_is_made_with_a_step_under_way() -> None:
    """The model ran out of memory between the doors: the step ends before its slots are replaced."""
    runtime, accelerator, plans = made(cache_size=4)
    before = runtime.num_slots
    job = runtime.begin(1, step(1))
    assert plans[-1][0].cpu and plans[-1][0].gpu, "this step is no hybrid one"
    assert runtime.make_room(torch.OutOfMemoryError("injected"))
    assert [entry.kind for entry in accelerator.entries if entry.site == "CPU experts"] == ["submit", "done"]
    assert 0 < runtime.num_slots < before
    with pytest.raises(ConfigError, match="this step is over"):
        runtime.finish(job)
    routed = step(3, 1)
    assert torch.equal(runtime.run(1, routed), wanted(1, (routed.hidden, routed.ids, routed.weights)))
    runtime.coordinator.check_integrity()


def test_an_accelerator_that_fails_in_begin_is_answered_for_in_finish(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, _, _ = made()
    monkeypatch.setattr(Lane, "note_failure", lambda lane: False)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(runtime.lanes[0].gpu, "launch", fail)
        routed = step(2)
        job = runtime.begin(1, routed)
    assert torch.equal(runtime.finish(job), wanted(1, (routed.hidden, routed.ids, routed.weights)))
    assert runtime.health().accelerators["emulated"].failed_steps == 1
    runtime.coordinator.check_integrity()


def test_the_host_says_what_is_decode() -> None:
    """Several sequences that decode together are no prompt; a prompt's last token alone is no decode."""
    runtime, _, plans = made()
    for num_tokens, phase, decodes in ((1, None, True), (4, None, False), (4, "decode", True), (1, "prefill", False)):
        runtime.run(0, step(num_tokens)._replace(phase=phase))
        assert plans[-1][1].is_decode == decodes
    runtime.run(0, step(CHUNK + 1))
    assert [routing.is_decode for _, routing in plans[-2:]] == [False, False]
    assert [routing.num_tokens for _, routing in plans[-2:]] == [CHUNK, 1]


def test_calls_in_a_wrong_order_are_one_sentence() -> None:
    runtime, _, _ = made()
    with pytest.raises(ConfigError, match="layer 7 has no experts in this runtime, which has those of 0, 1, 2"):
        runtime.run(7, step(1))
    first = runtime.begin(1, step(1))
    runtime.run(1, step(2))
    with pytest.raises(ConfigError, match="this step is over"):
        runtime.finish(first)
    with pytest.raises(ConfigError, match="layer 0 has been added already"):
        runtime.experts.add(layers()[0])
    with pytest.raises(ConfigError, match="no layer's experts were added"):
        assemble(ModelExperts(ExpertOptions(accelerator="none")))
    runtime.coordinator.check_integrity()


def test_a_failure_met_only_by_a_recording_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody prefetches, so that the recording waits first for what the gates guess; the gates are asked again."""
    runtime, _, _ = made(prefetch_size=0)
    recorder = _Recorder()
    runtime.recorder = recorder
    runtime.look_ahead(0, _Gates())

    def fail(*_: Any) -> None:
        raise RuntimeError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(runtime.lanes[0].readback, "wait_guesses", fail)
        routed = step(1)
        assert torch.equal(runtime.run(0, routed), wanted(0, (routed.hidden, routed.ids, routed.weights)))
    assert runtime.health().accelerators["emulated"].failed_steps == 1
    runtime.coordinator.check_integrity()
    routed = step(1, 1)
    assert torch.equal(runtime.run(0, routed), wanted(0, (routed.hidden, routed.ids, routed.weights)))
    assert [len(predicted) for predicted in recorder.predicted] == [1, 1]


class _Recorder:
    def __init__(self) -> None:
        self.predicted: list[Any] = []

    def record(self, layer: int, experts: Any, weights: Any, scores: Any, predicted: Any, *_: Any) -> None:
        self.predicted.append(predicted)


class _Gates:
    layers, num_experts = (1,), EXPERTS

    def __call__(self, hidden: torch.Tensor, ids: torch.Tensor, scores: torch.Tensor) -> None:
        ids[0].copy_(torch.arange(TOP_K))
        scores.fill_(1 / EXPERTS)
