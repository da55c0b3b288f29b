"""Models written in seconds: they load, answer the same wherever experts are, and are as large as released ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import hybrid
from benchmarks.on_gpu import shapes
from benchmarks.on_gpu.generate import _tensors, file_bytes, write_model
from benchmarks.on_gpu.plan import MODELS, Plan
from hybrimoe_kt.device.page_locks import PAGE
from hybrimoe_kt.engine.build import build_engine
from hybrimoe_kt.engine.engine import Sampling
from tests.support.generated_model import Type

POOLS = {True: 1 << 16, False: 1 << 15}
PROMPT = [7, 91, 13, 200, 55]


def tokens(file: Path, accelerator: str) -> list[int]:
    options = {
        "accelerator": accelerator, "cache_size": "50%", "cpu_backend": "torch_reference",
        "gpu_backend": "torch_reference", "fallback": False,
    }  # fmt: skip
    engine = build_engine(file, progress=False, option_overrides=options)
    engine.end_ids = set()
    found = list(engine.tokens(PROMPT, Sampling(max_new_tokens=6, temperature=0)))
    assert engine.runtime.health().is_clean
    return found


@pytest.mark.parametrize("model", MODELS)
def test_a_tiny_one_loads_and_says_the_same_everywhere(model: str, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    assert write_model(shapes.tiny_shape(model), file, POOLS) == file.stat().st_size
    alone = tokens(file, "none")
    assert len(alone) == 6 and tokens(file, "emulated") == alone


@pytest.mark.parametrize(
    ("model", "gigabytes"), [("qwen3-30b-a3b", 18.6), ("deepseek-v2-lite", 10.4), ("mixtral-8x7b", 28.4)]
)
def test_full_ones_are_about_as_large_as_released_q4_k_m_files(model: str, gigabytes: float) -> None:
    shape = shapes.full_shape(model)
    assert file_bytes(shape) == pytest.approx(gigabytes * 1e9, rel=0.05)
    kinds = {tensor.kind for tensor in _tensors(shape) if "_exps" in tensor.name}
    wanted = {Type.Q4_K, Type.Q5_0, Type.Q8_0} if model == "deepseek-v2-lite" else {Type.Q4_K, Type.Q6_K}
    assert kinds == wanted


def test_fewer_layers_where_there_is_no_room(tmp_path: Path) -> None:
    plan = Plan("cuda", out=str(tmp_path))
    few = shapes.choose(plan, "mixtral-8x7b", int(20e9), 600)
    assert isinstance(few, shapes.Chosen)
    assert 2 <= few.shape.layers < 32 and f"{few.shape.layers} of 32 layers" in few.note
    hurried = shapes.choose(plan, "mixtral-8x7b", int(20e9), 20)
    assert isinstance(hurried, shapes.Chosen) and hurried.shape.layers < few.shape.layers
    none = shapes.choose(plan, "mixtral-8x7b", int(7e9), 600)
    assert isinstance(none, str) and "no room or no time" in none


def test_a_shorter_deepseek_is_one_that_llama_cpp_reads(tmp_path: Path) -> None:
    few = shapes.choose(Plan("cuda", out=str(tmp_path)), "deepseek-v2-lite", int(12e9), 600)
    assert isinstance(few, shapes.Chosen)
    assert few.shape.layers < 27 and few.shape.q_lora_rank == 1536


def test_experts_of_the_hybrid_benchmark_can_be_locked_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every method's alike: whole pages, which no other memory shares."""
    monkeypatch.setattr(hybrid, "EXPERTS", 2)
    for matrix in hybrid.random_layer(0).matrices:
        assert matrix.data.data_ptr() % PAGE == 0 == matrix.data.numel() % PAGE
        assert matrix.data[0].equal(matrix.data[1]) and matrix.data[0].any()
