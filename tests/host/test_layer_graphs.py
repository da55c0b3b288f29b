"""Whole models whose layers are graphs: the stock model's logits however a text is cut, llama.cpp's greedy tokens."""

from __future__ import annotations

import dataclasses
import gc
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from hybrimoe_kt.backends.ggml import library as ggml
from hybrimoe_kt.engine.sampling import Sampling
from hybrimoe_kt.engine.token_generator import TokenGenerator
from hybrimoe_kt.host.hf.loading import load_model
from hybrimoe_kt.operators.layer_ggml import GgmlLayer
from tests.support import generated_hybrid, generated_metadata
from tests.support.by_modules import by_modules
from tests.support.generated_model import GeneratedModel, Shape, Type

from .llama_cpp import PRINTABLE, LlamaCpp
from .stock import logits_of, stock_model
from .test_equality import SHAPES

pytestmark = pytest.mark.skipif(ggml.unusable() is not None, reason="ggml's library is not installed")
Make = Callable[[Shape], GeneratedModel]

TEXT = random.Random(11).choices(range(250), k=300)
CHUNKS = (1, 7, 64, 512)
WITHIN = 1e-3
"""Of the range of the logits, with float32 weights and keys.

Measured at most 5e-7, and 6e-6 for the hybrids, with ggml 0.20.2 on AVX2.
"""
GREEDY = Sampling(max_new_tokens=12, temperature=0)
HYBRIDS = {"qwen3next", "qwen35moe"}
"""Whose conversations go on from their end or begin anew."""


def generator(model: GeneratedModel, *, kv_cache_type: str = "f32", **overrides: Any) -> TokenGenerator:
    options = {"cpu_backend": "torch_reference", "accelerator": "none", **overrides}
    loaded = load_model(model.path, option_overrides=options, progress=False, kv_cache_type=kv_cache_type)
    return TokenGenerator(loaded, set())


def logits_in(engine: TokenGenerator, text: Sequence[int], size: int) -> dict[int, torch.Tensor]:
    """Place -> the logits after it, of every place where a piece of `size` tokens ends."""
    engine.reset()
    found = {}
    for at in range(0, len(text), size):
        piece = list(text[at : at + size])
        logits = engine.append(piece)
        found[at + len(piece) - 1] = logits.clone()
    return found


@pytest.mark.parametrize("name", SHAPES)
def test_logits_are_the_stock_models_however_the_text_is_cut(generated: Make, name: str) -> None:
    model = generated(SHAPES[name])
    wanted = logits_of(stock_model(model), TEXT)
    engine = generator(model)
    assert engine.loop is not None
    span = wanted.max() - wanted.min()
    for size in CHUNKS:
        for place, logits in logits_in(engine, TEXT, size).items():
            assert (logits - wanted[place]).abs().max() <= WITHIN * span, (size, place)


@pytest.mark.parametrize("name", [name for name in SHAPES if name not in HYBRIDS])
def test_a_prefix_is_cropped_and_reused(generated: Make, name: str) -> None:
    """By graphs and by modules, in both orders, on the same keys and values."""
    model = generated(SHAPES[name])
    engine, wanted = generator(model), logits_of(stock_model(model), TEXT)
    span = wanted.max() - wanted.min()
    other = [(3 * token + 1) % 250 for token in TEXT]
    for kept, size in ((100, 5), (290, 1), (40, 200), (7, 32)):
        prompt = TEXT[: kept + size]
        list(engine.tokens([*TEXT[:kept], *other[kept : kept + 60]], GREEDY))
        assert engine.go_on_from(prompt) == kept
        logits = engine.append(prompt[kept:])
        assert (logits - wanted[kept + size - 1]).abs().max() <= WITHIN * span


@pytest.mark.parametrize(("kv_cache_type", "within"), [("f16", 0.001), ("q8_0", 0.02)])
def test_rounded_keys_change_logits_by_little(generated: Make, kv_cache_type: str, within: float) -> None:
    """Of the range. Measured at most 0.00013 and 0.0025 on AVX2."""
    model = generated(Shape(experts=4, top_k=4))  # every expert of every token: no rounding chooses another
    wanted = logits_of(stock_model(model), TEXT)
    span = wanted.max() - wanted.min()
    for size in (1, 64):
        found = logits_in(generator(model, kv_cache_type=kv_cache_type), TEXT, size)
        assert max((logits - wanted[place]).abs().max() for place, logits in found.items()) <= within * span


@hypothesis.given(
    capacity=st.integers(0, 8),
    policy=st.sampled_from(["adaptive", "mrs", "lru", "least_stale"]),
    scheduler=st.sampled_from(["paper", "balanced", "static", "gpu_only", "cpu_only"]),
    prefetch_size=st.integers(0, 4),
    predictor=st.sampled_from(["stale_gate", "corrected_gate", "history", "transition"]),
)
@hypothesis.settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
def test_no_bit_depends_on_what_is_cached_and_where_experts_run(
    generated: Make, capacity: int, policy: str, scheduler: str, prefetch_size: int, predictor: str
) -> None:
    model = generated(Shape(layers=3, dense_type=Type.Q8_0))
    sizes = (40, 7, 1, 1, 1, 1)
    rows = []
    for overrides in (
        {"accelerator": "none"},
        {
            "accelerator": "emulated",
            "cache_size": capacity,
            "policy": policy,
            "scheduler": scheduler,
            "prefetch_size": prefetch_size,
            "predictor": predictor,
        },
    ):
        engine, at, found = generator(model, kv_cache_type="f16", **overrides), 0, []
        assert engine.loop is not None
        for size in sizes:
            found.append(engine.append(TEXT[at : at + size]).clone())
            at += size
        rows.append(torch.stack(found))
    assert torch.equal(rows[0], rows[1])


def test_a_layer_within_transformers_own_loop_is_the_same(generated: Make) -> None:
    """As where a rule leaves some layers on the CPU and others not."""
    model = generated(SHAPES["qwen3moe"])
    wanted = logits_of(stock_model(model), TEXT)
    engine = generator(model)
    engine.loop = None
    for size in (1, 7):
        for place, logits in logits_in(engine, TEXT[:50], size).items():
            assert (logits - wanted[place]).abs().max() <= WITHIN * (wanted.max() - wanted.min())


def test_without_its_rule_a_model_is_transformers_own(generated: Make, tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text(
        "- match: {name: ^model\\.layers\\.\\d+\\.mlp\\.experts$}\n"
        "  replace: {class: hybrimoe_kt.operators.experts.HybriMoEExperts}\n"
    )
    loaded = load_model(
        generated(Shape()).path, rules_path=rules, progress=False, kv_cache_type="f32",
        option_overrides={"accelerator": "none"},
    )  # fmt: skip
    assert loaded.dense is None
    assert not any(isinstance(module, GgmlLayer) for module in loaded.model.modules())
    assert loaded.kv_cache_type == "f32" and not loaded.warnings


@pytest.mark.parametrize("name", ["qwen3moe", pytest.param("deepseek2", marks=pytest.mark.slow)])
def test_memory_is_flat_but_for_keys_and_values(generated: Make, name: str) -> None:
    """2,000 tokens in one conversation, then many conversations: memory grows by the cache and little else."""
    model = generated(dataclasses.replace(SHAPES[name], context=4096))
    engine = generator(model, kv_cache_type="f16", cpu_backend="ggml")
    list(engine.tokens(TEXT[:10], Sampling(max_new_tokens=300, temperature=0)))
    before = resident_bytes()
    list(engine.tokens(TEXT[:10], Sampling(max_new_tokens=2000, temperature=0)))
    held = engine.cache_bytes
    assert resident_bytes() - before <= 2 * held + 16 * 2**20
    before = resident_bytes()
    for number in range(200):
        list(engine.tokens([number, *TEXT[:40]], Sampling(max_new_tokens=5, temperature=0)))
    assert resident_bytes() - before <= 8 * 2**20


def test_steps_of_many_tokens_leave_little_behind(generated: Make) -> None:
    """Masks and what lies between operations belong to the graphs that are kept, and those are few."""
    engine = generator(generated(dataclasses.replace(SHAPES["qwen3moe"], context=4096)))
    text = TEXT * 14
    for at in range(0, 4000, 32):
        engine.append(text[at : at + 32])
    assert engine.loaded.dense is not None
    layers, memory = engine.loaded.dense.layers, engine.loaded.dense.memory
    gc.collect()
    assert len(memory.step(32)._masks) <= 4
    assert not engine.loop.takes(32, 10**6) and engine.loop.takes(1, 10**6)
    assert max(len(layer.dense._graphs) for layer in layers) <= 4
    assert engine.cache_bytes == sum(layer.held.num_bytes for layer in engine.conversation.cache.layers)


def test_a_long_convolution_is_a_larger_graph(generated: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """ggml ends the process where a graph has more operations than it was made for."""
    for module in (generated_metadata, generated_hybrid):
        monkeypatch.setattr(module, "LINEAR_KERNEL", 24)
    model = generated(dataclasses.replace(SHAPES["qwen3next"], seed=24))
    engine, modules = generator(model), generator(model)
    by_modules(modules)
    for size in (1, 7):
        wanted = logits_in(modules, TEXT[:30], size)
        for place, logits in logits_in(engine, TEXT[:30], size).items():
            assert (logits - wanted[place]).abs().max() <= WITHIN * (wanted[place].max() - wanted[place].min())


def resident_bytes() -> int:
    gc.collect()
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


WIDE: dict[str, Any] = {"types": (Type.F16,) * 3, "head_dim": 64, "context": 1024}
LLAMA_CPP = {
    name: dataclasses.replace(shape, **WIDE | ({"rope_dim": 32} if shape.architecture == "deepseek2" else {}))
    for name, shape in SHAPES.items()
    if name != "mixtral-old-experts"  # which it no longer reads
}
LLAMA_CPP["olmoe"] = dataclasses.replace(LLAMA_CPP["olmoe"], kv_heads=4)  # it takes no other
LLAMA_CPP["deepseek2"] = dataclasses.replace(LLAMA_CPP["deepseek2"], q_lora_rank=64)
LLAMA_CPP["minimax-m2"] = dataclasses.replace(LLAMA_CPP["minimax-m2"], dense_inter=256)  # its only width
ALIKE = {"qwen3next": 0.03}
"""Log-probabilities' difference; of others 0.005.

Measured at most 0.0118 and 0.0012 with ggml 0.20.2 and xllamacpp 2026.10 on AVX2.
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", LLAMA_CPP)
def test_greedy_tokens_are_llama_cpps(generated: Make, name: str) -> None:
    """Over 300 tokens, wherever the two likeliest are further apart than rounding explains."""
    model = generated(LLAMA_CPP[name])
    engine = generator(model, kv_cache_type="f32")
    prompt = TEXT[:40]
    theirs = LlamaCpp(model.path, context=512).written(prompt, 300)
    assert len(theirs) == 300
    logits = engine.append(prompt)
    allowed, within = torch.tensor(PRINTABLE), ALIKE.get(name, 0.005)
    for token, logprob in theirs:
        ours = logits.log_softmax(-1)
        assert abs(ours[token].item() - logprob) < within
        best = int(allowed[ours[allowed].argmax()])
        assert best == token or ours[best] - ours[token] < 2 * within
        logits = engine.append([token])
