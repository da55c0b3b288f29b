"""When the host takes what a captured step has sent for sent."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hybrimoe_kt.device.backend import Routed
from hybrimoe_kt.device.emulated.immediate import ImmediateAccelerator
from hybrimoe_kt.device.recorder import Recorder
from hybrimoe_kt.device.sent_routing import SentRouting


class _Late:
    """An event of a piece that goes on after it has sent."""

    def __init__(self) -> None:
        self.is_reached = False

    def is_done(self) -> bool:
        return self.is_reached


def made(dtype: torch.dtype = torch.bfloat16) -> tuple[SentRouting, Routed, torch.Tensor, torch.Tensor]:
    routed = Routed(
        torch.randn(1, 32).to(dtype), torch.tensor([[4, 2, 7]]), torch.tensor([[0.5, 0.25, 0.25]]),
    )  # fmt: skip
    scores, number = torch.rand(8), torch.zeros(1, dtype=torch.int64)
    return SentRouting(ImmediateAccelerator(), routed, scores, number, 64), routed, scores, number


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_host_reads_what_was_sent(dtype: torch.dtype) -> None:
    sent, routed, scores, _ = made(dtype)
    sent.send(routed, scores, Recorder())
    assert sent.read() == scores.tolist()
    assert sent.host.hidden.dtype == torch.float32
    for found, wanted in zip(sent.host[:3], routed[:3], strict=True):
        assert torch.equal(found, wanted.to(found.dtype))
    for found, wanted in zip(sent.routed[:3], routed[:3], strict=True):
        assert torch.equal(found, wanted) and found.data_ptr() != wanted.data_ptr()


@pytest.mark.parametrize("sees", [True, False])
def test_the_last_replay_is_not_taken_for_this_one(sees: bool) -> None:
    sent, routed, scores, number = made()
    capture, event = Recorder(), _Late()
    capture.host_sees_writes = sees  # type: ignore[misc]
    stand_in: Any = event
    sent.piece_done = stand_in
    for step in (1, 2):
        number.fill_(step)
        sent.expected, event.is_reached = step, False
        assert not sent.is_sent(), "what the step before sent is still there"
        sent.send(routed, scores, capture)
        assert sent.is_sent() == sees, "seen at once where that is possible, else behind the piece"
        event.is_reached = True
        assert sent.is_sent()
