"""Captured work where a driver refuses, and the stream that captured steps run on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hybrimoe_kt.device.recorder import Recorder
from hybrimoe_kt.device.step_graph import CapturedWork, CaptureError
from hybrimoe_kt.device.torch_accelerator import TorchAccelerator


class _Refusing(Recorder):
    """A driver that finds fault with what it is to capture."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self._error = error
        self.num_begun = 0

    def begin(self) -> None:
        super().begin()
        self.num_begun += 1

    def end(self) -> Any:
        self.abort()
        raise self._error


@pytest.mark.parametrize("error", [CaptureError("no"), RuntimeError("operation not permitted when capturing")])
def test_what_a_driver_does_not_capture_is_done_each_time(error: Exception) -> None:
    """It is no failure of the accelerator, which would be given up after a few."""
    capture, total = _Refusing(error), torch.zeros(1)

    def work() -> None:
        total.copy_(total + 1)

    captured = CapturedWork(capture, work)
    captured()
    total.zero_()
    for _ in range(3):
        captured()
    assert capture.num_begun == 1 and total.item() == 4, "the emulated driver did it as well"


def test_work_that_is_broken_stays_an_error() -> None:
    calls: list[int] = []

    def work() -> None:
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("broken")

    captured = CapturedWork(Recorder(), work)
    captured()
    with pytest.raises(RuntimeError, match="broken"):
        captured()


class _Stream:
    def __init__(self, told: list[tuple[str, str]], name: str) -> None:
        self._told, self.name = told, name

    def wait_stream(self, other: _Stream) -> None:
        self._told.append((self.name, other.name))


def test_after_an_error_the_models_usual_stream_waits_for_the_captured_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is given back then, slots and the cache, may still be read."""
    told: list[tuple[str, str]] = []
    entered: list[str] = []

    @contextlib.contextmanager
    def within(stream: _Stream) -> Iterator[None]:
        entered.append(stream.name)
        yield

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: _Stream(told, "own"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: _Stream(told, "usual"))
    monkeypatch.setattr(torch.cuda, "stream", within)
    accelerator = object.__new__(TorchAccelerator)
    accelerator.device, accelerator._model_stream = torch.device("cuda", 0), None
    with pytest.raises(ZeroDivisionError), accelerator.model_stream():
        raise ZeroDivisionError
    assert entered == ["own"] and told == [("own", "usual"), ("usual", "own")]


READ: dict[str, Any] = {
    "value": lambda x: x[0].item(), "truth": lambda x: bool(x[0] > 0), "equal": lambda x: torch.equal(x, x + 1),
    "places": lambda x: x.nonzero(), "mask": lambda x: x[x > 0], "unique": lambda x: x.unique(),
    "counts": lambda x: x.repeat_interleave(torch.tensor([1, 2, 1])),
}  # fmt: skip


@pytest.mark.parametrize("read", READ)
def test_what_a_host_would_wait_for_ends_a_capture(read: str) -> None:
    capture, given = Recorder(), torch.ones(3)
    capture.begin()
    try:
        with pytest.raises(CaptureError, match="reads a value on the host"):
            READ[read](given)
        assert given[torch.tensor([2, 0])].shape == (2,), "places have a number"
    finally:
        capture.abort()
