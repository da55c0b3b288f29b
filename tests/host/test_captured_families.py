"""Captured steps of every family whose files llama.cpp's converter writes: the eager ones' bits, or a refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hybrimoe_kt.engine.steps.captured_loop import CapturedLoop
from hybrimoe_kt.engine.token_generator import TokenGenerator
from hybrimoe_kt.host.hf.loading import LoadedModel, load_model
from tests.support.captured_steps import EXACT, decode

from .families import FAMILIES, random_model, save_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("little_room", "one_thread")]

NOT_CAPTURED = {
    "nemotron",
    "nemotron-latent",
    "deepseek32",
    "glm-dsa",
    "qwen4exp",
    "deepseek4",
    "minimax-m3",
    "llama4",
}
"""Families that keep states or chunks, or look at what an indexer finds, which captured steps do not read."""


def load(folder: Path) -> LoadedModel:
    return load_model(folder, device="emulated:0", option_overrides=EXACT, progress=False)


def made_of(loaded: LoadedModel, *, captures: bool) -> TokenGenerator:
    made = TokenGenerator(loaded, set(), captures=True)
    if isinstance(made.loop, CapturedLoop):
        made.loop.captures = captures
    return made


@pytest.mark.parametrize("name", FAMILIES)
def test_replayed_steps_are_the_eager_ones(name: str, tmp_path: Path) -> None:
    """Beyond windows, and across a growth of the cache."""
    folder = save_checkpoint(name, random_model(name), tmp_path)
    captured = made_of(load(folder), captures=True)
    assert isinstance(captured.loop, CapturedLoop) == (name not in NOT_CAPTURED)
    if name in NOT_CAPTURED:
        return
    found: Any = decode(captured, 40)
    assert torch.equal(found, decode(made_of(load(folder), captures=False), 40))
    usual = TokenGenerator(load(folder), set())
    torch.testing.assert_close(decode(usual, 40), found, rtol=0, atol=1e-3)
