"""Whole models of every type that files hold, experts and dense weights alike: the stock model's logits, llama.cpp's
probabilities."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hybrimoe_kt.backends.ggml import library as ggml
from hybrimoe_kt.backends.ggml import linear
from hybrimoe_kt.host.hf.loading import LoadedModel, load_model
from hybrimoe_kt.quants import TYPES
from tests.support.generated_model import GeneratedModel, Shape, Type
from tests.support.random_blocks import KINDS, PUBLISHED

from .llama_cpp import next_tokens_apart
from .stock import greedy, logits_of, stock_model

pytestmark = pytest.mark.skipif(ggml.unusable() is not None, reason="ggml's library is not installed")
Make = Callable[[Shape], GeneratedModel]

PROMPT = random.Random(7).choices(range(250), k=23)
LONG = random.Random(8).choices(range(250), k=80)
"""From 64 tokens on a processor that multiplies bfloat16 does."""
ALL: dict[str, Any] = {"experts": 4, "top_k": 4}
"""Every expert of every token: no rounding chooses another one."""
FALLBACK = {
    Type.Q6_K: Type.Q8_0,
    Type.Q5_K: Type.Q5_1,
    Type.Q4_K: Type.Q5_0,
    Type.Q3_K: Type.Q4_0,
    Type.Q2_K: Type.Q4_0,
}
"""What llama.cpp takes where rows are no multiples of 256; IQ4_NL for every IQ."""
QUICK = {("qwen3moe", Type.Q4_K), ("qwen3moe", Type.MXFP4), ("deepseek2", Type.IQ3_XXS), ("deepseek2", Type.Q5_1)}


def qwen3moe(kind: Type) -> Shape:
    """Every matrix of `kind`, widths that only blocks of 32 allow where they do."""
    if TYPES[kind].block_values == 256:
        return Shape(**ALL, head_dim=64, types=(kind,) * 3, dense_type=kind)
    return Shape(**ALL, hidden=288, inter=96, head_dim=72, types=(kind,) * 3, dense_type=kind)


def deepseek2(kind: Type) -> Shape:
    """Experts of 352 and a dense layer of 704, no multiples of 256; up-projections as old files have them, or new."""
    is_wide = TYPES[kind].block_values == 256
    down = FALLBACK.get(kind, Type.IQ4_NL) if is_wide else kind
    return Shape(
        **ALL, architecture="deepseek2", inter=352, dense_inter=704, head_dim=64, rope_dim=32, q_lora_rank=64,
        kv_lora_rank=256 if is_wide else 96, split_kv_b=not is_wide, types=(kind, kind, down), dense_type=kind,
    )  # fmt: skip


FAMILIES = {"qwen3moe": qwen3moe, "deepseek2": deepseek2}
CASES = [
    pytest.param(name, kind, id=f"{name}-{kind.name}", marks=() if (name, kind) in QUICK else pytest.mark.slow)
    for name in FAMILIES
    for kind in KINDS
]


TOLERANCE = {Type.F32: 1e-5, Type.F16: 1.5e-3, Type.BF16: 8e-3}
"""Of each token's logits, |difference| / |logits less their mean|; of blocks 0.08, of floats with bfloat16 0.012.

Measured at most 1e-6, 0.0006, 0.0046, 0.052 (IQ3_S in deepseek2) and 0.0071, two layers, ggml 0.20.2 on AVX2.
"""
SAME = {Type.F16: 0.01, Type.BF16: 0.02}
"""Of a log-probability in llama.cpp; of blocks 0.25. Both round activations alike: most agree to 1e-6, and where
float32 sums differ in a last bit some value is rounded the other way: up to 0.001, 0.005 and 0.12 on AVX2.
"""


def load(model: GeneratedModel) -> LoadedModel:
    return load_model(model.path, option_overrides={"accelerator": "none"}, progress=False)


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_logits_are_the_stock_models(generated: Make, family: str, kind: Type, monkeypatch: pytest.MonkeyPatch) -> None:
    model = generated(FAMILIES[family](kind))
    stock, ours = stock_model(model), load(model)
    assert not ours.warnings
    assert {matrix.ggml_type for matrix in ours.loader.packed.values()} == ({int(kind)} if kind != Type.F32 else set())
    assert ours.runtime.executor.cpu.describe().startswith("auto: ggml")
    for prompt, by_bfloat16 in ((PROMPT, False), (LONG, False), (LONG, True)):
        monkeypatch.setattr(linear, "multiplies_bfloat16", lambda by=by_bfloat16: by)
        wanted = logits_of(stock, prompt)
        spread = (wanted - wanted.mean(dim=1, keepdim=True)).norm(dim=1)
        assert (spread / wanted.shape[1] ** 0.5).min() > 0.3, "logits that are all alike would prove nothing"
        errors = (logits_of(ours.model, prompt) - wanted).norm(dim=1) / spread
        within = max(TOLERANCE.get(kind, 0.08), 0.012 * (by_bfloat16 and kind != Type.F32))
        assert errors.max() < within, f"token {int(errors.argmax())} of {len(prompt)}: {errors.max():.4f}"


LLAMA = [case for case in CASES if case.values[1] in PUBLISHED]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "kind"), LLAMA)
def test_tokens_and_probabilities_are_llama_cpps(
    generated: Make, family: str, kind: Type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step by step with a cache, and of a long prompt at once."""
    monkeypatch.setattr(linear, "multiplies_bfloat16", lambda: False)  # llama.cpp has no such method
    model = generated(FAMILIES[family](kind))
    ours = load(model).model
    tokens, rows = greedy(ours, LONG[:9], 6)
    prompts = [LONG[:9] + tokens[:number] for number in range(6)] + [LONG[:1], LONG]
    found = torch.log_softmax(torch.stack([*rows, *(logits_of(ours, one)[-1] for one in prompts[-2:])]), dim=-1)
    theirs = next_tokens_apart(model.path, prompts)
    assert theirs is not None, "llama.cpp refuses the file"
    within = SAME.get(kind, 0.25)
    assert sum(map(bool, theirs)) >= 6, "hardly any prompt could be compared"
    for prompt, mine, answer in zip(prompts, found, theirs, strict=True):
        for token, logarithm in answer.items():
            assert abs(float(mine[token]) - logarithm) < within, (len(prompt), token)
        first, second = sorted(answer.values(), reverse=True)[:2] if answer else (0.0, 0.0)
        if first - second > 2 * within:
            assert int(mine.argmax()) == max(answer, key=answer.__getitem__), len(prompt)
