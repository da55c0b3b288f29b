"""Models with several residual streams: what they keep beside keys and values, and tables that stay in the file."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from gguf import GGUFValueType

from hybrimoe_kt.engine.build import build_engine
from hybrimoe_kt.engine.engine import Sampling
from hybrimoe_kt.engine.token_generator import TokenGenerator
from hybrimoe_kt.host.hf.loading import load_model
from hybrimoe_kt.operators.embedding import QuantizedEmbedding
from tests.support.rewritten import rewritten

from . import llama_cpp_converter
from .families import random_model, save_checkpoint
from .llama_cpp import LlamaCpp
from .stock import greedy, logits_of
from .test_file_contents import assert_as_llama_cpp

pytestmark = pytest.mark.slow

TEXT = random.Random(9).choices(range(32, 94), k=300)
EXACT = {"cpu_backend": "torch_reference", "accelerator": "none"}


@pytest.mark.parametrize("name", ["deepseek4", "qwen4exp"])
@pytest.mark.parametrize("size", [1, 7, 64])
def test_a_long_text_in_pieces(tmp_path: Path, name: str, size: int) -> None:
    """Beyond windows and the 128 tokens that become one: as the stock model reads it at once."""
    stock = random_model(name)
    ours = load_model(save_checkpoint(name, stock, tmp_path), option_overrides=EXACT, progress=False)
    wanted = logits_of(stock, TEXT)
    within = float(1e-3 * (wanted.max() - wanted.min()))
    engine = TokenGenerator(ours, set())
    for at in range(0, len(TEXT), size):
        piece = TEXT[at : at + size]
        torch.testing.assert_close(engine.append(piece), wanted[at + len(piece) - 1], rtol=0, atol=within)
    assert engine.cache_bytes > 0


@pytest.mark.parametrize("name", ["deepseek4", "qwen4exp"])
def test_what_cannot_go_back_is_read_anew(tmp_path: Path, name: str) -> None:
    folder = save_checkpoint(name, random_model(name), tmp_path)
    engine = build_engine(folder, option_overrides=EXACT, progress=False)
    sampling = Sampling(max_new_tokens=6, temperature=0)
    edited = [*TEXT[:40], 7, 8]
    fresh = list(engine.tokens(edited, sampling))
    list(engine.tokens(TEXT, sampling))
    assert list(engine.tokens(edited, sampling)) == fresh
    assert engine.last_run()["reused_tokens"] == 0
    answer = list(engine.tokens(TEXT, sampling))
    list(engine.tokens([*TEXT, *answer, 5], sampling))
    assert engine.last_run()["reused_tokens"] >= len(TEXT)


@pytest.mark.parametrize("device", ["cpu", "emulated:0"])
def test_a_table_of_runs_stays_where_the_file_is_mapped(tmp_path: Path, device: str) -> None:
    root = llama_cpp_converter.find()
    if root is None:
        pytest.skip(llama_cpp_converter.MISSING)
    llama_cpp_converter.convert([save_checkpoint("qwen4exp", random_model("qwen4exp"), tmp_path)], root, "MOSTLY_Q8_0")
    options = {"accelerator": "none"} if device == "cpu" else {"accelerator": "emulated", "cache_size": 3}
    ours = load_model(tmp_path / "model.gguf", device=device, option_overrides=options, progress=False)
    tables = [module for module in ours.model.modules() if isinstance(module, QuantizedEmbedding)]
    assert [table.reads_on_host for table in tables] == [True, True]
    assert not any("ngram_embedding.weight" in name for name, _ in ours.model.named_parameters())
    engine, theirs, compared = TokenGenerator(ours, set()), LlamaCpp(tmp_path / "model.gguf"), 0
    for start in range(6):
        engine.reset()
        found = torch.log_softmax(engine.append(TEXT[start : start + 60]), dim=-1)
        for token, logarithm in theirs.next_token(TEXT[start : start + 60]).items():
            assert abs(float(found[token]) - logarithm) < 0.05, (start, token)
            compared += 1
    assert compared >= 4


def test_a_file_without_ratios_attends_to_all(tmp_path: Path) -> None:
    """As llama.cpp reads it: its converter writes zeros where Transformers has renamed the kinds of layers."""
    root = llama_cpp_converter.find()
    if root is None:
        pytest.skip(llama_cpp_converter.MISSING)
    llama_cpp_converter.convert([save_checkpoint("qwen4exp", random_model("qwen4exp"), tmp_path)], root)
    keys = {"qwen4exp.attention.compress_ratios": ([0] * 4, GGUFValueType.INT32)}
    assert assert_as_llama_cpp(rewritten(tmp_path / "model.gguf", tmp_path / "all.gguf", keys)) == "equal"


def test_the_first_layers_route_by_the_tokens_ids(tmp_path: Path) -> None:
    stock = random_model("deepseek4")
    folder = save_checkpoint("deepseek4", stock, tmp_path)
    options = {"cpu_backend": "torch_reference", "accelerator": "emulated", "cache_size": 3, "policy": "mrs"}
    ours = load_model(folder, device="emulated:0", option_overrides=options, progress=False)
    torch.testing.assert_close(logits_of(ours.model, TEXT[:50]), logits_of(stock, TEXT[:50]), rtol=0, atol=1e-4)
    assert greedy(ours.model, TEXT[:50], 12)[0] == greedy(stock, TEXT[:50], 12)[0]


def test_gates_beside_norms_of_another_type_are_asked(tmp_path: Path) -> None:
    """Norms stay float32 in a model of bfloat16, gates do not."""
    folder = save_checkpoint("deepseek4", random_model("deepseek4"), tmp_path)
    options = {"accelerator": "emulated", "cache_size": 3}
    ours = load_model(folder, device="emulated:0", dtype=torch.bfloat16, option_overrides=options, progress=False)
    logits_of(ours.model, TEXT[:20])
    assert ours.runtime.health().is_clean, ours.runtime.health()
