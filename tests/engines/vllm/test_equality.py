"""Greedy tokens of eight concurrent requests are the stock engine's, wherever experts are and whoever has them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; make test-engines")

from .offline import elsewhere, here, prompts
from .server import free_port, serving, started

Make = Callable[..., tuple[Path, Path]]
MODELS = ("qwen3moe", "qwen2moe")
"""Without and with shared experts."""
REFERENCE = {"accelerator": "none", "cpu_backend": "torch_reference"}
MACHINES: dict[str, dict[str, Any]] = {
    "reference": REFERENCE,
    "ggml": {"accelerator": "none", "cpu_backend": "ggml"},
    "0 % cached": {"accelerator": "emulated", "cache_size": 0, "cpu_backend": "torch_reference"},
    "25 % cached": {"accelerator": "emulated", "cache_size": "25%", "cpu_backend": "torch_reference"},
    "100 % cached": {"accelerator": "emulated", "cache_size": "all", "cpu_backend": "torch_reference"},
}
QUARTER = {"hybrimoe": MACHINES["25 % cached"]}
ONE_CORE_EACH = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
PIPELINE: dict[str, Any] = {
    "pipeline_parallel_size": 2,
    "enforce_eager": False,
    "compilation_config": {"mode": 2, "backend": "eager"},
}
RANKS: dict[str, dict[str, Any]] = {
    "expert parallel 2": {"tensor_parallel_size": 2, "enable_expert_parallel": True},
    "tensor parallel 2": {"tensor_parallel_size": 2},
    "pipeline parallel 2": PIPELINE,
}


@pytest.fixture(scope="module")
def stock(family: Make) -> Callable[[str], list[list[int]]]:
    """The stock engine's answers, computed once a model."""
    known: dict[str, list[list[int]]] = {}

    def answers(name: str) -> list[list[int]]:
        if name not in known:
            known[name] = here(family(name)[0])
        return known[name]

    return answers


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", MODELS)
def test_wherever_experts_are(family: Make, stock: Any, name: str, machine: str) -> None:
    found = here(family(name)[1], additional_config={"hybrimoe": MACHINES[machine]})
    assert found == stock(name)


@pytest.mark.parametrize("name", MODELS)
def test_safetensors(family: Make, stock: Any, name: str) -> None:
    assert here(family(name)[0], additional_config=QUARTER) == stock(name)
    assert here(family(name)[0], quantization="hybrimoe", additional_config={"hybrimoe": REFERENCE}) == stock(name)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", MODELS)
def test_however_ranks_share_them(family: Make, stock: Any, tmp_path: Path, name: str, ranks: str) -> None:
    model = family(name)[ranks != "tensor parallel 2"]  # checkpoints' experts may be cut
    found = elsewhere(model, tmp_path, env=ONE_CORE_EACH, additional_config=QUARTER, **RANKS[ranks])
    assert found == stock(name)


def test_with_a_prefix_cache_and_short_steps(family: Make, stock: Any) -> None:
    """Prompts come in pieces beside other requests' next tokens."""
    found = here(
        family("qwen3moe")[1], additional_config=QUARTER, enable_prefix_caching=True, max_num_batched_tokens=16
    )
    assert found == stock("qwen3moe")


def test_a_draft_model_stays_vllms_own(family: Make, stock: Any) -> None:
    """The same model guesses for itself, all at once: verified steps have several tokens of each request."""
    checkpoint, file = family("qwen3moe")
    guess = {"model": str(checkpoint), "method": "draft_model", "num_speculative_tokens": 3}
    found = here(file, additional_config=QUARTER, speculative_config=guess)
    assert found == stock("qwen3moe")


def test_two_nodes_on_loopback(family: Make, stock: Any, tmp_path: Path) -> None:
    """Two servers that know each other by an address alone, as they would on two machines."""
    file = family("qwen3moe")[1]
    between = ["--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    shared = [*between, "--tensor-parallel-size", "2", "--enable-expert-parallel", "--served-model-name", "model"]
    shared += ["--distributed-executor-backend", "mp"]
    options = MACHINES["25 % cached"]
    with (
        started(file, tmp_path, *shared, "--node-rank", "1", "--headless", options=options, env=on_core(1)),
        serving(file, tmp_path, *shared, "--node-rank", "0", options=options, env=on_core(0)) as server,
        ThreadPoolExecutor(8) as pool,
    ):
        asked = [pool.submit(server.complete, "model", prompt, 12 + place) for place, prompt in enumerate(prompts(256))]
        assert [each.result() for each in asked] == stock("qwen3moe")


def on_core(number: int) -> dict[str, str]:
    return {"VLLM_CPU_OMP_THREADS_BIND": str(number)}
