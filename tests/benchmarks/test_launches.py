"""A decode step's launches in one layer stay few, counted as they happen in Triton's interpreter."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks.launches import MODELS, Launches, compared, count, rules_with, table
from tests.support.generated_model import generate

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the kernels run on the GPU here")
LATENT = ("bmm", "clone", "_to_copy", "mul", "add", "_softmax")
"""What absorbed latent attention does between its projections, where other attention is one kernel."""


def test_a_layer_of_qwen3_moe_takes_25_launches(tmp_path: Path) -> None:
    """30 are allowed; what changes one of these numbers should know."""
    model = generate(MODELS["Qwen3-30B-A3B"], tmp_path / "model.gguf", keep_state=False).path
    found = count(model, rules_with("qwen3moe", "triton", tmp_path))
    parts = {"norms": 2, "attention": 10, "residuals": 2, "router": 2, "experts": 6, "look-ahead": 3}
    assert found.by_part == parts
    assert sum(found.kernels.values()) == 25
    assert found.copies == {
        "routing to host": 3, "slot tables to device": 1, "CPU answer to device": 1, "guesses to host": 1,
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_stock_modules_take_thrice_as_many(name: str) -> None:
    """Of DeepSeek-V2-Lite's, nine are one attention."""
    stock, ours = compared(MODELS[name])
    counts = [sum(launches.kernels.values()) for launches in (stock, ours)]
    assert counts == {"Qwen3-30B-A3B": [76, 25], "DeepSeek-V2-Lite": [80, 43]}[name]
    assert f"| **{counts[0]}** | **{counts[1]}** |" in table({name: (stock, ours)})
    if name == "DeepSeek-V2-Lite":
        within = {kernel: number for (part, kernel), number in ours.kernels.items() if part == "attention"}
        assert sum(within[kernel] for kernel in LATENT) == 9


def test_views_and_memory_are_no_launches() -> None:
    import torch

    launches = Launches()
    with launches.of("norms"), launches.counting():
        torch.empty(4, 4).view(16)[:8].zero_().topk(2)
        with launches.of(None):
            torch.ones(3)
    assert launches.kernels == {("norms", "zero_"): 1, ("norms", "topk"): 2}
