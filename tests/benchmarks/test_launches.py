"""A decode step's launches in one layer stay few, counted as they happen in Triton's interpreter."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks.launches import MODELS, Launches, compared, count, rules_with, table
from tests.support.generated_model import generate

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the kernels run on the GPU here")
MOST = 30
EACH = {
    "Qwen3-30B-A3B": {"norms": 2, "attention": 11, "router": 2, "experts": 5, "look-ahead": 2},
    "DeepSeek-V2-Lite": {
        "norms": 2, "attention": 14, "router": 2, "shared experts": 4, "experts": 5, "look-ahead": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_layer_takes_few_launches(name: str, tmp_path: Path) -> None:
    """MOST are allowed; what changes one of these numbers should know."""
    shape = MODELS[name]
    model = generate(shape, tmp_path / "model.gguf", keep_state=False).path
    rules = "deepseek2" if shape.architecture == "deepseek2" else "qwen3moe"
    found = count(model, rules_with(rules, "triton", tmp_path), is_fixed=True)
    assert found.by_part == EACH[name]
    assert sum(found.kernels.values()) <= MOST
    attention = {kernel for part, kernel in found.kernels if part == "attention"}
    assert "merge_splits_kernel" in attention and not {"_softmax", "bmm"} & attention, "Triton's, as a GPU captures it"
    assert found.copies == {
        "routing to host": 3, "slot tables to device": 1, "CPU answer to device": 1, "guesses to host": 1,
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_stock_modules_take_thrice_as_many(name: str) -> None:
    stock, ours = compared(MODELS[name])
    counts = [sum(launches.kernels.values()) for launches in (stock, ours)]
    assert counts[1] == sum(EACH[name].values()) and counts[0] > 2.5 * counts[1]
    assert f"| **{counts[0]}** | **{counts[1]}** |" in table({name: (stock, ours)})


def test_views_and_memory_are_no_launches() -> None:
    import torch

    launches = Launches()
    with launches.of("norms"), launches.counting():
        torch.empty(4, 4).view(16)[:8].zero_().topk(2)
        with launches.of(None):
            torch.ones(3)
    assert launches.kernels == {("norms", "zero_"): 1, ("norms", "topk"): 2}
