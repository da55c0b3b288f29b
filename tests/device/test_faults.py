"""Whatever fails, at whatever operation: no wrong answer, nothing left half done, no hang, one report."""

from __future__ import annotations

import logging
import random
import re
from typing import Any

import pytest

from hybrimoe_kt.device.emulated.faults import Failure, Faults
from hybrimoe_kt.errors import KernelError

from .machine import LAYERS, Machine, make

TOKENS = (1, 4, 1, 1, 1)
KINDS: dict[str, tuple[Failure, ...]] = {
    "copy": ("raise", "late", "stall", "out_of_memory"),
    "launch": ("raise", "late", "stall", "out_of_memory"),
}
DEADLINE_S = 0.3
OPTIONS: dict[str, Any] = {"cache_size": 2, "deadline_s": DEADLINE_S, "prefetch_size": 3, "num_accelerators": 2}
QUICK_SEEDS, ALL_SEEDS = 4, 200


def play(patch: pytest.MonkeyPatch, seed: int, faults: Faults, tokens: tuple[int, ...] = TOKENS) -> Machine:
    """Run all steps under `faults`; every answer is checked."""
    machine = make(patch, seed, faults=faults, **OPTIONS)
    machine.play(*tokens)
    return machine


def num_operations(kind: str) -> int:
    """How many operations of a kind a run has, when nothing fails."""
    faults = Faults(kind, at=10**9)
    with pytest.MonkeyPatch.context() as patch:
        play(patch, 0, faults)
    return faults.seen


def strike(seed: int, kind: str, failure: Failure, at: int, times: int = 1, **changes: Any) -> Machine:
    faults = Faults(kind, at, failure, times)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in changes.items():
            patch.setitem(OPTIONS, name, value)
        machine = play(patch, seed, faults)
    if failure in ("raise", "late"):  # a stalled stream is never seen to end, so nothing is ordered after it
        assert not machine.races, f"seed {seed}: {machine.races}"
    if faults.site is not None and machine.num_failures == 0:
        # Work that failed and that nobody asked about: a prefetch dropped, or the run's last copies.
        assert failure in ("late", "stall"), f"{faults.site} failed unnoticed"
        assert "expert copy" in faults.site or "apart" in faults.site, f"{faults.site} failed unnoticed"
    return machine


@pytest.mark.parametrize(("kind", "failure"), [(kind, failure) for kind, all_ in KINDS.items() for failure in all_])
def test_an_accelerator_that_fails(kind: str, failure: Failure) -> None:
    check(kind, failure, range(QUICK_SEEDS))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "failure"), [(kind, failure) for kind, all_ in KINDS.items() for failure in all_])
def test_an_accelerator_that_fails_whatever_the_seed(kind: str, failure: Failure) -> None:
    check(kind, failure, range(QUICK_SEEDS, ALL_SEEDS))


def check(kind: str, failure: Failure, seeds: range) -> None:
    num = num_operations(kind)
    noticed = 0
    for seed in seeds:
        noticed += strike(seed, kind, failure, random.Random(seed).randrange(num), times=1 + seed % 2).num_failures > 0
    assert noticed > len(seeds) // 4, "the faults were hardly ever reached"


@pytest.mark.parametrize(("kind", "failure"), [("launch", "raise"), ("copy", "late"), ("copy", "raise")])
def test_faults_in_a_streamed_prompt(kind: str, failure: Failure) -> None:
    """The slots lent to a layer are gone when its failure is dealt with."""
    noticed = 0
    for seed in range(0, 12, 2):
        machine = strike(seed, kind, failure, at=20 + 11 * seed, prefill_streaming_bytes=2**20, prefetch_size=1)
        noticed += machine.num_failures
    assert noticed > 1


def test_an_accelerator_and_the_cpu_failing_together_leave_no_expert_that_never_came() -> None:
    """The step is lost, and says so; what its transfers did not bring is not taken for resident."""
    lost = 0
    for seed in range(8):
        with pytest.MonkeyPatch.context() as patch:
            machine = make(patch, seed, faults=Faults("launch", 25, "raise", 3), **OPTIONS | {"num_accelerators": 1})
            wait = type(machine.runtime.executor.cpu).wait
            for number in range(12):
                broken = 3 <= number < 6
                with pytest.MonkeyPatch.context() as inner:
                    if broken:
                        inner.setattr(type(machine.runtime.executor.cpu), "wait", _broken)
                    try:
                        machine.play(1)
                    except RuntimeError as error:
                        assert broken and "the CPU broke" in str(error)  # noqa: PT017 - not every step reaches it
                        lost += 1
                machine.runtime.coordinator.check_integrity()
            assert type(machine.runtime.executor.cpu).wait is wait
    assert lost > 0


def _broken(self: object) -> None:
    raise RuntimeError("the CPU broke")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_at_every_operation(kind: str) -> None:
    for at in range(num_operations(kind)):
        strike(0, kind, "raise", at)
        strike(0, kind, "late", at)


def test_one_report_and_the_cache_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        machine = strike(1, "launch", "raise", 12)
    told = [record.message for record in caplog.records if "failed" in record.message]
    assert len(told) == 1
    assert re.fullmatch(r"emulated:[01] failed: injected: .+; this step is computed on the CPU", told[0]), told
    assert len(machine.runtime.lanes) == 2
    assert machine.runtime.coordinator.stats.experts_on_gpu > 0


def test_failing_again_and_again_ends_with_the_cpu(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), pytest.MonkeyPatch.context() as patch:
        machine = play(patch, 0, Faults("launch", 10, "raise", times=10**9))
    assert machine.runtime.lanes == ()
    told = [record.message for record in caplog.records]
    assert sum("is not used any more" in text for text in told) == 2, told
    assert len(told) <= 4, "once per device and consequence"


def test_out_of_memory_shrinks_the_cache(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), pytest.MonkeyPatch.context() as patch:
        patch.setitem(OPTIONS, "cache_size", 4)
        machine = play(patch, 3, Faults("launch", 80, "out_of_memory"))
    slots = [lane.pool.num_slots for lane in machine.runtime.lanes]
    assert sorted(slots) in ([4, 6], [3, 8]), "three quarters on one device, all on the other"
    assert any("the expert cache shrinks to" in record.message for record in caplog.records)
    assert not machine.races


@pytest.mark.parametrize("failure", ["raise", "late"])
def test_a_cpu_call_that_fails_is_an_error_and_the_next_works(failure: Failure) -> None:
    with pytest.MonkeyPatch.context() as patch:
        machine = make(patch, 0, faults=Faults("cpu", 3, failure), **OPTIONS)
        raised = 0
        for _ in range(5):
            for layer in range(LAYERS):
                try:
                    machine.run(layer, 1)
                except (KernelError, RuntimeError) as error:
                    assert "injected" in str(error)  # noqa: PT017 - which step fails depends on the plans
                    raised += 1
                machine.runtime.coordinator.check_integrity()
        assert raised == 1


def test_a_cpu_worker_that_stalls_ends_with_a_clear_error() -> None:
    with pytest.MonkeyPatch.context() as patch:
        machine = make(patch, 0, faults=Faults("cpu", 2, "stall"), **OPTIONS)
        with pytest.raises(KernelError, match=r"CPU experts' worker .* did not end within 0\.3 s"):
            machine.play(*(1,) * 5)
        with pytest.raises(KernelError, match="restart the program"):
            machine.play(1)


def test_memory_that_is_not_there_at_the_start(caplog: pytest.LogCaptureFixture) -> None:
    """`auto` takes what is free; a size the user gave is an error."""
    with pytest.MonkeyPatch.context() as patch:
        machine = make(patch, 0, capacity_bytes=260_000, **OPTIONS | {"cache_size": "auto", "num_accelerators": 1})
        assert 0 < machine.runtime.num_slots < 24
        lane = machine.runtime.lanes[0]
        assert lane.pool.num_bytes <= 130_000
