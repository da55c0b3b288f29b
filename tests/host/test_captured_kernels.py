"""Captured steps with every kernel of this package in them, in Triton's interpreter: the same bits as eager steps."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks.launches import rules_with
from hybrimoe_kt.engine.steps.captured_loop import CapturedLoop
from hybrimoe_kt.engine.token_generator import TokenGenerator
from hybrimoe_kt.host.hf.loading import load_model
from tests.support.captured_steps import decode as decode_few
from tests.support.captured_steps import generator, load

from .test_equality import PROMPT, SHAPES
from .test_packed_weights import Make, packed_file, without_choice
from .test_row_kernels import OTHER_RULES

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the kernels run on the GPU here"),
    pytest.mark.usefixtures("one_thread"),
]
QUICK = ("qwen3moe",)
NAMES = ("qwen3moe", "deepseek3", "qwen3next", "glm4moe")
EACH = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in NAMES]


def decode(path: Path, rules: Path, *, captures: bool, cache_size: Any) -> tuple[torch.Tensor, CapturedLoop]:
    options = {"accelerator": "emulated", "gpu_backend": "triton", "cpu_backend": "torch_reference"}
    options |= {"cache_size": cache_size, "prefetch_size": 2}
    if cache_size == "all":
        options["scheduler"] = "gpu_only"  # whose plans do not depend on what a profile says of experts this small
    loaded = load_model(path, rules_path=rules, device="emulated:0", option_overrides=options, progress=False)
    made = TokenGenerator(loaded, set(), captures=True)
    assert isinstance(made.loop, CapturedLoop)
    made.loop.captures = captures
    rows = [made.append(PROMPT[:5]).clone()]
    for _ in range(4):
        rows.append(made.append([int(rows[-1].argmax())]).clone())
    assert made.runtime.health().is_clean, "the CPU answered in the kernels' place"
    return torch.stack(rows), made.loop


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("cache_size", [0.5, pytest.param("all", marks=pytest.mark.slow)])
def test_all_kernels_are_captured(generated: Make, name: str, cache_size: Any, tmp_path: Path) -> None:
    path = packed_file(generated(without_choice(name)), tmp_path / "packed.gguf")
    rules = rules_with(OTHER_RULES.get(name, name), "triton", tmp_path)
    wanted, _ = decode(path, rules, captures=False, cache_size=cache_size)
    found, loop = decode(path, rules, captures=True, cache_size=cache_size)
    assert torch.equal(found, wanted) and loop.num_captures == 1
    pieces = loop.captured.pieces
    assert pieces is not None and (pieces.num_pieces == 1) == (cache_size == "all")


@pytest.mark.slow
@pytest.mark.parametrize("host_store", ["mapped", "page_locked"])
def test_a_device_plans_by_its_kernels(generated: Make, host_store: str) -> None:
    """In their interpreter; with a page-locked copy those that bring experts run there, too."""
    model = generated(SHAPES["qwen3moe"])
    options = {"gpu_backend": "triton", "host_store": host_store}
    answers = []
    for planner in ("host", "device"):
        made = generator(load(model, **options, planner=planner), captures=True)
        answers.append(decode_few(made, 5))
        assert (made.runtime.device_planner is not None) == (planner == "device")
    torch.testing.assert_close(answers[1], answers[0], rtol=0.0, atol=0.05)  # whose kernels round activations
    planner = made.runtime.device_planner
    assert planner is not None and planner.num_steps >= 4
