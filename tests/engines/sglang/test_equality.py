"""Greedy tokens of eight concurrent requests are stock SGLang's, wherever experts are and however ranks share them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sglang", reason="SGLang is not installed; docs/engines.md")

from .offline import TWO_RANKS, elsewhere, hybrimoe

Make = Callable[..., tuple[Path, Path]]
REFERENCE = {"accelerator": "none", "cpu_backend": "torch_reference"}
QUARTER = {"accelerator": "emulated", "cache_size": "25%", "cpu_backend": "torch_reference"}
RANKS: dict[str, dict[str, Any]] = {
    "tensor parallel 2": {"tp_size": 2},
    "expert parallel 2": {"tp_size": 2, "ep_size": 2},
}


@pytest.fixture(scope="module")
def stock(family: Make, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[list[int]]]:
    """The stock engine's answers, computed once a model."""
    known: dict[str, list[list[int]]] = {}

    def answers(name: str) -> list[list[int]]:
        if name not in known:
            known[name] = elsewhere(family(name)[0], tmp_path_factory.mktemp("stock"))
        return known[name]

    return answers


@pytest.mark.parametrize("options", [REFERENCE, QUARTER], ids=["reference", "25 % cached"])
def test_a_gguf_file(family: Make, stock: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    assert elsewhere(family("qwen3moe")[1], tmp_path, **hybrimoe(options)) == stock("qwen3moe")


def test_safetensors(family: Make, stock: Any, tmp_path: Path) -> None:
    assert elsewhere(family("qwen3moe")[0], tmp_path, **hybrimoe(QUARTER)) == stock("qwen3moe")


def test_shared_experts_and_a_dense_layer(family: Make, stock: Any, tmp_path: Path) -> None:
    """And a factor on routed experts' answers. Of Qwen2 MoE stock SGLang has a kernel for cards alone."""
    assert elsewhere(family("glm4moe")[1], tmp_path, **hybrimoe(QUARTER)) == stock("glm4moe")


@pytest.mark.parametrize("name", ["mixtral", "olmoe"])
def test_models_that_sglang_has_in_other_ways(family: Make, stock: Any, tmp_path: Path, name: str) -> None:
    """One has another class for quantised weights, one tells the number of experts a token to its router alone."""
    assert elsewhere(family(name)[1], tmp_path, **hybrimoe(QUARTER)) == stock(name)


@pytest.mark.parametrize("ranks", RANKS)
def test_however_ranks_share_them(family: Make, stock: Any, tmp_path: Path, ranks: str) -> None:
    model = family("qwen3moe")[ranks != "tensor parallel 2"]  # checkpoints' experts may be cut
    assert elsewhere(model, tmp_path, env=TWO_RANKS, **hybrimoe(QUARTER), **RANKS[ranks]) == stock("qwen3moe")


def test_with_a_prefix_cache_and_short_steps(family: Make, stock: Any, tmp_path: Path) -> None:
    """Prompts come in pieces beside other requests' next tokens."""
    engine = {"disable_radix_cache": False, "chunked_prefill_size": 16, "enable_mixed_chunk": True}
    assert elsewhere(family("qwen3moe")[1], tmp_path, **hybrimoe(QUARTER), **engine) == stock("qwen3moe")
