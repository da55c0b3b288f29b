"""What fails while a device plans: a token, one warning and the planner are lost, and no answer."""

from __future__ import annotations

import importlib
import logging
import threading
from functools import partial
from typing import Any

import pytest
import torch

from hybrimoe_kt.backends.torch_reference import TorchReferenceCpu
from hybrimoe_kt.device.backend import Routed
from hybrimoe_kt.device.step_graph import CaptureError, StepLost, listeners
from hybrimoe_kt.errors import KernelError
from hybrimoe_kt.runtime.device_planner import DevicePlanner
from hybrimoe_kt.runtime.runtime import assemble
from tests.support.captured_steps import PROMPT, Make, decode, generator, load, loop_of

from .test_device_planner import DEVICE, check, planner_of
from .test_equality import SHAPES

pytestmark = pytest.mark.usefixtures("little_room", "one_thread")

CALLS = 1, 4, 5, 9, 20
OPS = "plan_step", "look_ahead", "land"


@pytest.mark.parametrize(
    "where",
    [pytest.param("warm", marks=pytest.mark.slow), "captured", pytest.param("replayed", marks=pytest.mark.slow)],
)
def test_a_failing_share_costs_the_step_and_the_planner(
    generated: Make, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = generated(SHAPES["qwen3moe"])
    wanted = decode(generator(load(model), captures=True), 12)
    cpu = Failing()
    options = {"scheduler": "static", **DEVICE}  # so that every miss is the CPU's
    made = generator(load(model, **options, assemble=partial(assemble, cpu=cpu)), captures=True)
    rows = [made.append(PROMPT).clone()]
    for number in range(12):
        cpu.is_broken = number >= {"warm": 0, "captured": 1, "replayed": 5}[where]
        with caplog.at_level(logging.WARNING):
            rows.append(made.append([int(rows[-1].argmax())]).clone())
    torch.testing.assert_close(torch.stack(rows), wanted, rtol=0, atol=1e-4)
    assert made.runtime.device_planner is None
    told = [record.getMessage() for record in caplog.records if "the host plans from now on" in record.getMessage()]
    assert len(told) == 1 and "broken" in told[0]
    made.runtime.coordinator.check_integrity()


@pytest.mark.parametrize(
    ("op", "call"),
    [
        pytest.param(op, call, marks=() if (op, call) in (("plan_step", 9),) else pytest.mark.slow)
        for op in OPS
        for call in CALLS
    ],
)
def test_a_failing_kernel_costs_the_step_and_the_planner(
    generated: Make, op: str, call: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In a step that is warm, captured or replayed."""
    model, calls = generated(SHAPES["qwen3moe"]), []
    wanted = decode(generator(load(model), captures=True), 12)
    module = importlib.import_module(f"hybrimoe_kt.kernels.{op}.naive")
    work = getattr(module, f"naive_{op}")

    def failing(*given: Any, **named: Any) -> None:
        calls.append(op)
        if len(calls) == call:
            raise RuntimeError("the device is broken")
        work(*given, **named)

    monkeypatch.setattr(module, f"naive_{op}", failing)
    made = generator(load(model, **DEVICE), captures=True)
    with caplog.at_level(logging.WARNING):
        found = decode(made, 12)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    assert made.runtime.device_planner is None and len(calls) == call
    told = [record.getMessage() for record in caplog.records if "the host plans from now on" in record.getMessage()]
    assert len(told) == 1 and "the device is broken" in told[0]
    made.runtime.coordinator.check_integrity()


def test_slots_that_are_taken_away_between_two_tokens(generated: Make) -> None:
    model = generated(SHAPES["qwen3moe"])
    wanted = decode(generator(load(model), captures=True), 16)
    made = generator(load(model, cache_size=6, **DEVICE), captures=True)
    rows = decode(made, 8)
    first = planner_of(made)
    assert made.runtime.make_room(torch.OutOfMemoryError("asked for"))
    more = decode(made, 7, [int(rows[-1].argmax())])
    assert torch.equal(torch.cat([rows, more]), wanted)
    assert planner_of(made) is not first and planner_of(made).num_steps
    check(made)


def test_a_share_that_never_ends_is_given_up(generated: Make, caplog: pytest.LogCaptureFixture) -> None:
    cpu = Failing()
    options = {"scheduler": "static", "deadline_s": 0.3, **DEVICE}
    loaded = load(generated(SHAPES["qwen3moe"]), **options, assemble=partial(assemble, cpu=cpu))
    made = generator(loaded, captures=True)
    decode(made, 4)
    cpu.hangs.set()
    with caplog.at_level(logging.WARNING), pytest.raises(KernelError, match="has not come back; restart"):
        decode(made, 9, [5])
    assert made.runtime.device_planner is None
    cpu.released.set()


class Failing(TorchReferenceCpu):
    """Fails, or hangs, while told to, in the thread that answers a device and nowhere else."""

    def __init__(self) -> None:
        super().__init__()
        self.is_broken = False
        self.hangs, self.released = threading.Event(), threading.Event()

    def submit(self, layer: int, routed: Routed) -> None:
        if threading.current_thread() is not threading.main_thread():
            if self.is_broken:
                raise RuntimeError("the CPU is broken")
            if self.hangs.is_set():
                self.released.wait(5.0)
        super().submit(layer, routed)


def test_what_cannot_be_planned_on_a_device_is_the_hosts(generated: Make, caplog: pytest.LogCaptureFixture) -> None:
    model = generated(SHAPES["qwen3moe"])
    for options, reason in (
        ({"cache_size": 1}, "fewer slots than a token has experts, 2"),
        ({"accelerator": "emulated:adversarial"}, "runs no kernels of its own"),
        ({"gpu_backend": "torch"}, "told by the host what to compute"),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            made = generator(load(model, **DEVICE, **options), captures=True)
        assert made.runtime.device_planner is None
        assert any(reason in record.getMessage() for record in caplog.records), reason


def test_nothing_is_recovered_within_a_capture(generated: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """There a driver refuses the host's waits, and slots would stay in doubt."""
    model, calls = generated(SHAPES["qwen3moe"]), []
    wanted = decode(generator(load(model), captures=True), 8)
    module = importlib.import_module("hybrimoe_kt.kernels.plan_step.naive")
    work, give_up = module.naive_plan_step, DevicePlanner._give_up

    def failing(*given: Any, **named: Any) -> None:
        if listeners:
            raise RuntimeError("the device is broken")
        work(*given, **named)

    def outside(planner: DevicePlanner, *given: Any, **named: Any) -> None:
        assert not listeners, "a capture has begun"
        calls.append(planner)
        give_up(planner, *given, **named)

    made = generator(load(model, **DEVICE), captures=True)
    monkeypatch.setattr(module, "naive_plan_step", failing)
    monkeypatch.setattr(DevicePlanner, "_give_up", outside)
    torch.testing.assert_close(decode(made, 8), wanted, rtol=0, atol=1e-4)
    assert len(calls) == 1 and made.runtime.device_planner is None and loop_of(made).captures
    made.runtime.coordinator.check_integrity()


def test_no_token_begins_behind_one_that_failed(generated: Make) -> None:
    made = generator(load(generated(SHAPES["qwen3moe"]), **DEVICE), captures=True)
    decode(made, 4)
    planner = planner_of(made)
    planner._lost = RuntimeError("the device is broken")
    with pytest.raises(StepLost, match="the device is broken"):
        planner.begin_step()
    assert not planner.is_open and made.runtime.device_planner is None


def test_where_captures_end_the_host_plans_and_says_so(generated: Make, caplog: pytest.LogCaptureFixture) -> None:
    model = generated(SHAPES["qwen3moe"])
    wanted = decode(generator(load(model), captures=True), 10)
    made = generator(load(model, **DEVICE), captures=True)
    rows = decode(made, 5)
    with caplog.at_level(logging.WARNING):
        made.steps.capture_no_more(CaptureError("refused"))
    assert any("planner device is not used" in record.getMessage() for record in caplog.records)
    assert made.runtime.configuration()["planner"] == "host"
    more = decode(made, 4, [int(rows[-1].argmax())])
    assert torch.equal(torch.cat([rows, more]), wanted)
    made.runtime.coordinator.check_integrity()
