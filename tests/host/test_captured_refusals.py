"""What no step can be captured with: it is found out, said, and done without."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from hybrimoe_kt.device.recorder import Recorder
from hybrimoe_kt.engine.memory.growing_layers import GrowingLayer
from hybrimoe_kt.engine.steps.captured_loop import CapturedLoop, captured_loop
from hybrimoe_kt.engine.token_generator import TokenGenerator
from hybrimoe_kt.host.hf.loading import load_model
from tests.support.captured_steps import EXACT, Make, decode, generator, load, loop_of

from .test_equality import SHAPES

pytestmark = pytest.mark.usefixtures("little_room", "one_thread")
MASK = CapturedLoop._mask


@pytest.mark.parametrize("baked", ["position", "length"])
def test_a_number_that_python_worked_out_is_found(generated: Make, baked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the recorder is for: with such a mistake in the cache, tokens come out wrong, as they would on a GPU."""
    layer = GrowingLayer

    def update(self: Any, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.fixed_length is None:
            return update_(self, key_states, value_states)
        for held, new in zip(self._rooms, (key_states, value_states), strict=True):
            if baked == "position":
                held[..., self.length : self.length + 1, :] = new
            else:
                held.index_copy_(2, self.position, new)
        end = self.length + 1 if baked == "length" else self.room
        return tuple(held[..., :end, :] for held in self._rooms)

    model = generated(SHAPES["mixtral"])
    wanted = decode(generator(load(model), captures=False), 6)
    update_ = layer.update
    monkeypatch.setattr(layer, "update", update)
    monkeypatch.setattr(CapturedLoop, "_mask", lambda self, cache: None if baked == "length" else MASK(self, cache))
    torch.testing.assert_close(decode(generator(load(model), captures=False), 6), wanted, rtol=0, atol=1e-4)
    found = decode(generator(load(model), captures=True), 6)
    assert (found[3:] - wanted[3:]).abs().max() > 0.01


def test_a_step_that_reads_a_value_is_not_captured(generated: Make, caplog: pytest.LogCaptureFixture) -> None:
    loaded = load(generated(SHAPES["qwen3moe"]))
    wanted = decode(generator(loaded, captures=False), 8)
    made = generator(loaded, captures=True)
    norm: Any = loaded.model.model.layers[1].input_layernorm
    norm.register_forward_hook(lambda module, args, output: output * float((output[0, 0, 0] * 0 + 1).item()))
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(decode(made, 8), wanted, rtol=0, atol=1e-4)  # part of it as one prompt
    assert [record for record in caplog.records if "reads a value on the host" in record.message]
    assert not loop_of(made).captures and loop_of(made).num_captures == 0


def test_a_driver_that_refuses_to_capture(
    generated: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(generated(SHAPES["qwen3moe"]))
    wanted = decode(generator(loaded, captures=False), 8)
    made, begin, calls = generator(loaded, captures=True), Recorder.begin, []

    def refuse(self: Recorder) -> None:
        calls.append(self)
        if len(calls) == 2:
            raise RuntimeError("operation not permitted when stream is capturing")
        begin(self)

    monkeypatch.setattr(Recorder, "begin", refuse)
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(decode(made, 8), wanted, rtol=0, atol=1e-4)
    (warning,) = [record.message for record in caplog.records if "captured" in record.message]
    assert "operation not permitted" in warning and len(calls) == 2 and not loop_of(made).captures


def test_what_cannot_be_captured_says_why(generated: Make, caplog: pytest.LogCaptureFixture) -> None:
    model = generated(SHAPES["qwen3moe"])
    on_cpu = load_model(model.path, option_overrides=EXACT, progress=False)
    made = TokenGenerator(on_cpu, set())
    on_cpu.dense = None
    with caplog.at_level(logging.WARNING):
        assert captured_loop(on_cpu, made.new_cache(), captures=True) is None
    assert "layer 0 keeps keys and values in a StoredLayer" in caplog.text
