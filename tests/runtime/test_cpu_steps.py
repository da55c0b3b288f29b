"""Steps without an accelerator are computed without a plan, and leave behind what planned ones would."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrimoe_kt.backends.ggml import library as ggml
from hybrimoe_kt.backends.torch_reference import TorchReferenceCpu
from hybrimoe_kt.config import ExpertOptions
from hybrimoe_kt.core.coordinator import Coordinator
from hybrimoe_kt.core.types import Phase
from hybrimoe_kt.device.backend import CpuBackend
from hybrimoe_kt.errors import ConfigError, KernelError
from hybrimoe_kt.runtime import ModelExperts, Routed, Runtime, assemble
from tests.device.machine import CHUNK, EXPERTS, HIDDEN, LAYERS, TOP_K, layers, wanted

needs_ggml = pytest.mark.skipif(ggml.unusable() is not None, reason="ggml's library is not installed")
BACKENDS = ["torch_reference", *(pytest.param(name, marks=needs_ggml) for name in ("ggml", "auto"))]
PHASES: tuple[Phase | None, ...] = (None, "prefill", "decode")


def made(
    cpu: str | CpuBackend, *, is_planned: bool = False, accelerator: str = "none", **options: Any
) -> tuple[Runtime, list[Any]]:
    """A runtime and the plans it makes; where `is_planned` somebody listens, so that it makes them."""
    name, given = (cpu, None) if isinstance(cpu, str) else ("torch_reference", cpu)
    experts = ModelExperts(
        ExpertOptions(accelerator=accelerator, cpu_backend=name, cpu_threads=1, max_chunk_tokens=CHUNK, **options)
    )
    for layer in layers():
        experts.add(layer)
    plans: list[Any] = []
    runtime = assemble(experts, cpu=given, on_plan=(lambda plan, routing: plans.append(plan)) if is_planned else None)
    return runtime, plans


def pair(cpu: str, **options: Any) -> tuple[Runtime, Runtime]:
    """A runtime that plans and one that need not."""
    return made(cpu, is_planned=True, **options)[0], made(cpu, **options)[0]


def step(num_tokens: int, seed: int = 0, phase: Phase | None = None) -> Routed:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(num_tokens, EXPERTS, generator=generator).argsort(dim=1)[:, :TOP_K]
    weights = torch.rand(num_tokens, TOP_K, generator=generator)
    logits = torch.randn(num_tokens, EXPERTS, generator=generator)
    return Routed(torch.randn(num_tokens, HIDDEN, generator=generator), ids, weights, logits, phase)


def drawn(seed: int) -> tuple[int, Routed]:
    """A layer and a step of any length, phase, dtypes and layout."""
    draw = torch.Generator().manual_seed(seed)

    def one_of(number: int) -> int:
        return int(torch.randint(number, (1,), generator=draw))

    routed = step((1, 1, 2, CHUNK, CHUNK + 1, 3 * CHUNK)[one_of(6)], seed, PHASES[one_of(3)])
    if one_of(3) == 0:
        routed = routed._replace(hidden=routed.hidden.bfloat16(), weights=routed.weights.bfloat16())
    if one_of(2):
        routed = routed._replace(ids=routed.ids.int())
    if one_of(3) == 0:
        routed = routed._replace(ids=routed.ids.t().contiguous().t(), weights=routed.weights.t().contiguous().t())
    if one_of(3) == 0:
        routed = routed._replace(hidden=routed.hidden.repeat(3, 1)[-len(routed.hidden) :])
    if one_of(3) == 0:
        routed = routed._replace(hidden=routed.hidden.t().contiguous().t())
    return one_of(LAYERS), routed


def counted(runtime: Runtime) -> tuple[Any, ...]:
    core = runtime.coordinator
    return runtime.statistics(), core.heat(), core.last_token(), core.now_s, runtime.seconds.steps, runtime.health()


def none_is_planned(monkeypatch: pytest.MonkeyPatch, runtime: Runtime) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("planned")

    monkeypatch.setattr(runtime.coordinator, "plan", fail)


@pytest.mark.parametrize("cpu", BACKENDS)
def test_the_same_answers_and_counts_as_with_plans(cpu: str) -> None:
    @settings(max_examples=30, deadline=None)
    @given(seeds=st.lists(st.integers(0, 2**20), min_size=1, max_size=6))
    def holds(seeds: list[int]) -> None:
        for seed in seeds:
            layer, routed = drawn(seed)
            found = unplanned.run(layer, routed)
            assert torch.equal(found, planned.run(layer, routed))
            assert found.dtype is routed.hidden.dtype
            assert counted(unplanned) == counted(planned)

    planned, unplanned = pair(cpu)
    with pytest.MonkeyPatch.context() as patch:
        none_is_planned(patch, unplanned)
        holds()
    assert planned.coordinator.stats.num_plans > 0
    assert min(astuple(unplanned.seconds)) >= 0 and unplanned.seconds.read > 0 and unplanned.seconds.wait > 0


@pytest.mark.parametrize("cpu", BACKENDS)
def test_whoever_listens_is_told(cpu: str) -> None:
    runtime, plans = made(cpu, is_planned=True)
    runtime.run(0, step(1))
    assert [sorted(plan.cpu) for plan in plans] == [sorted(step(1).ids[0].tolist())]


@pytest.mark.parametrize("cpu", BACKENDS)
def test_an_answer_is_in_memory_of_its_own(cpu: str) -> None:
    runtime, _ = made(cpu)
    for num_tokens in (1, 4):
        found = [runtime.run(seed % LAYERS, step(num_tokens, seed)) for seed in range(4)]
        again = [runtime.run(seed % LAYERS, step(num_tokens, seed)) for seed in range(4)]
        assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


@pytest.mark.parametrize("cpu", BACKENDS)
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_what_is_not_finite_is_refused_before_it_is_counted(cpu: str, num_tokens: int) -> None:
    planned, unplanned = pair(cpu)
    for bad in (float("nan"), float("inf")):
        routed = step(num_tokens)
        routed.hidden[0, 7] = bad
        for runtime in (planned, unplanned):
            with pytest.raises(KernelError, match="layer 1 are not finite"):
                runtime.run(1, routed)
    assert unplanned.coordinator.stats.num_plans == 0
    assert torch.equal(unplanned.run(1, step(num_tokens)), planned.run(1, step(num_tokens)))
    assert counted(unplanned) == counted(planned)


@pytest.mark.parametrize("cpu", BACKENDS)
def test_a_layer_that_is_not_there_is_named(cpu: str) -> None:
    runtime, _ = made(cpu)
    with pytest.raises(ConfigError, match="layer 7 has no experts in this runtime, which has those of 0, 1, 2"):
        runtime.run(7, step(1))


@pytest.mark.parametrize("cpu", BACKENDS)
def test_a_step_that_fails_leaves_the_runtime_usable(cpu: str) -> None:
    """And is counted as one that was planned."""

    def fail(*_: Any) -> None:
        raise KernelError("injected")

    planned, unplanned = pair(cpu)
    for runtime in (planned, unplanned):
        with pytest.MonkeyPatch.context() as patch:
            for name in ("compute", "submit"):
                patch.setattr(runtime.executor.cpu, name, fail)
            for num_tokens in (1, 4, 2 * CHUNK):
                with pytest.raises(KernelError, match="injected"):
                    runtime.run(0, step(num_tokens))
    assert torch.equal(unplanned.run(0, step(2)), planned.run(0, step(2)))
    unplanned.seconds.steps = planned.seconds.steps = 0  # chunks begun and not ended
    assert counted(unplanned) == counted(planned)


class Late(TorchReferenceCpu):
    """Computes when it is asked whether it has, and may fail then."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[tuple[int, Routed]] = []
        self.fails = False

    def submit(self, layer: int, routed: Routed) -> None:
        assert not self.given, "one call is in flight at a time"
        assert routed.ids.dtype is torch.int64, "nobody said that others are taken"
        self.given.append((layer, routed))

    def wait(self) -> torch.Tensor:
        super().submit(*self.given.pop())
        if self.fails:
            raise KernelError("injected")
        return super().wait()


def test_the_cpu_is_at_work_between_begin_and_finish() -> None:
    cpu = Late()
    runtime, _ = made(cpu)
    routed = step(3)._replace(ids=step(3).ids.int())
    job = runtime.begin(1, routed)
    assert len(cpu.given) == 1
    assert torch.equal(runtime.finish(job), wanted(1, step(3)[:3]))


@pytest.mark.parametrize("cpu", [Late, pytest.param(lambda: "ggml", marks=needs_ggml)], ids=["beside", "here"])
def test_a_step_that_is_never_finished_is_abandoned(cpu: Callable[[], Any]) -> None:
    planned, unplanned = made(cpu(), is_planned=True)[0], made(cpu())[0]
    for runtime in (planned, unplanned):
        first = runtime.begin(1, step(2))
        second = runtime.begin(2, step(1))
        with pytest.raises(ConfigError, match="this step is over"):
            runtime.finish(first)
        runtime.finish(second)
        with pytest.raises(ConfigError, match="this step is over"):
            runtime.finish(second)
    assert torch.equal(unplanned.run(0, step(5)), planned.run(0, step(5)))
    assert counted(unplanned) == counted(planned)


def test_what_fails_late_comes_out_of_finish() -> None:
    cpu = Late()
    runtime, _ = made(cpu)
    cpu.fails = True
    job = runtime.begin(0, step(1))
    with pytest.raises(KernelError, match="injected"):
        runtime.finish(job)
    runtime.begin(0, step(2))
    with pytest.raises(KernelError, match="injected"):
        runtime.run(0, step(1))  # after the one before has been abandoned, which failed, too
    cpu.fails = False
    assert torch.equal(runtime.run(1, step(3)), wanted(1, step(3)[:3]))


def test_a_listener_that_comes_later_is_told_from_then_on() -> None:
    runtime, _ = made("torch_reference")
    runtime.run(0, step(1))
    taken: list[int] = []

    class Recorder:
        def record(self, layer: int, *_: Any) -> None:
            taken.append(layer)

    runtime.recorder = Recorder()
    runtime.run(1, step(1))
    runtime.recorder = None
    runtime.run(2, step(1))
    assert taken == [1]
    assert runtime.coordinator.stats.num_plans == 3


def test_once_the_accelerator_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its layers are the CPU's from the next step on; before, and where another one has slots, steps are planned."""
    options = {"accelerator": "emulated", "cache_size": 3, "scheduler": "paper", "profile": "default"}
    planned, unplanned = pair("torch_reference", **options)
    for runtime in (planned, unplanned):
        for number in range(7):
            layer, routed = number % LAYERS, step(1, number)
            assert torch.equal(runtime.run(layer, routed), wanted(layer, routed[:3]))
        with monkeypatch.context() as patch:
            patch.setattr(runtime.lanes[0], "note_failure", lambda: True)
            patch.setattr(runtime.lanes[0].gpu, "launch", _fail)
            for number in range(LAYERS):
                assert torch.equal(runtime.run(number, step(4)), wanted(number, step(4)[:3]))
        assert not runtime.lanes and runtime.health().accelerators["emulated"].given_up
    none_is_planned(monkeypatch, unplanned)
    for seed in range(9):
        layer, routed = drawn(seed)
        assert torch.equal(unplanned.run(layer, routed), planned.run(layer, routed))
    assert counted(unplanned) == counted(planned)
    unplanned.coordinator.check_integrity()


def _fail(*_: Any, **__: Any) -> None:
    raise RuntimeError("injected")


def test_where_slots_are_steps_are_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Coordinator, "count_on_cpu", _fail)
    runtime, _ = made("torch_reference", accelerator="emulated", cache_size=3)
    assert torch.equal(runtime.run(0, step(2)), wanted(0, step(2)[:3]))
