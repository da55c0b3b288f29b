"""The same file and prompt in llama.cpp: the same tokens, or a difference smaller than the rounding explains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hybrimoe_kt.engine.build import build_engine
from hybrimoe_kt.engine.chat.chat_template import chat_prompt
from hybrimoe_kt.engine.engine import Engine, Sampling
from hybrimoe_kt.host.hf.loading import load_model
from tests.support.generated_model import GeneratedModel, Shape, Type

from .llama_cpp import LlamaCpp
from .stock import logits_of

PROMPTS = ["Hello! How are you today?", "Tell me about your family.", "What is the capital of France?", "Good morning."]

MARGIN = 0.25
"""Log-probability by which the first choice may lead where the two differ. Both quantise activations to 8 bits, in
different blocks: kt-kernel's log-probabilities of the two likeliest tokens differ from the reference
backend's by up to 0.17 on the embedded model (these prompts and the 20 tokens after them; kt-kernel 0.7.2, AVX2).
"""


def assert_same_tokens(ours: list[int], theirs: list[int], margins: list[float]) -> int:
    """Return how many tokens agree; fail where they differ although llama.cpp was sure, or one ends first."""
    for at, (mine, other) in enumerate(zip(ours, theirs, strict=False)):
        if mine != other:
            assert margins[at] < MARGIN, (
                f"token {at}: {mine} here, {other} in llama.cpp, which led by {margins[at]:.3f}"
            )
            return at
    assert len(ours) == len(theirs), "one answer ends where the other goes on"
    return len(ours)


def greedy(engine: Engine, prompt: list[int], num_tokens: int) -> list[int]:
    engine.reset()
    return list(engine.tokens(prompt, Sampling(max_new_tokens=num_tokens, temperature=0)))


@pytest.fixture(scope="module")
def engine(embedded_model: Path) -> Engine:
    return build_engine(embedded_model, progress=False)


@pytest.fixture(scope="module")
def llama_cpp(embedded_model: Path) -> LlamaCpp:
    return LlamaCpp(embedded_model)


@pytest.mark.parametrize("text", PROMPTS)
def test_the_embedded_model_answers_as_in_llama_cpp(engine: Engine, llama_cpp: LlamaCpp, text: str) -> None:
    prompt = chat_prompt(engine.tokenizer, [{"role": "user", "content": text}])
    ours = greedy(engine, prompt, 32)
    theirs, margins = llama_cpp.greedy(prompt, 32)
    theirs = [token for token in theirs if token not in engine.end_ids]  # it reports the end token, we leave it out
    assert assert_same_tokens(ours, theirs, margins) >= 3


def test_a_long_answer_agrees_with_llama_cpp(engine: Engine, llama_cpp: LlamaCpp) -> None:
    """The model's own answers end early; plain text goes on, and 16 tokens must agree or be explained."""
    prompt = list(engine.tokenizer("It was a fine day, and the family")["input_ids"])
    ours = greedy(engine, prompt, 32)
    theirs, margins = llama_cpp.greedy(prompt, 32)
    theirs = [token for token in theirs if token not in engine.end_ids]  # it reports the end token, we leave it out
    assert assert_same_tokens(ours, theirs, margins) >= 3
    assert len(ours) >= 16


@pytest.mark.parametrize(
    "shape",
    [
        Shape(types=(Type.F16,) * 3, experts=16, top_k=4, layers=3),
        Shape(types=(Type.F16,) * 3, architecture="qwen2moe", layers=3, head_dim=64, shared_experts=2),
        Shape(types=(Type.F16,) * 3, architecture="llama", layers=3, head_dim=64),
        Shape(types=(Type.F16,) * 3, architecture="olmoe", layers=3, head_dim=64, kv_heads=4),
        Shape(types=(Type.F16,) * 3, architecture="glm4moe", layers=3, head_dim=64, rope_dim=32),
        Shape(types=(Type.F16,) * 3, architecture="deepseek2", layers=3, head_dim=64, rope_dim=32, q_lora_rank=64),
        Shape(
            types=(Type.F16,) * 3,
            architecture="deepseek2",
            layers=3,
            head_dim=64,
            rope_dim=32,
            q_lora_rank=64,
            yarn_factor=4.0,
            sigmoid=True,
        ),
        Shape(
            types=(Type.F16,) * 3,
            architecture="deepseek2",
            layers=3,
            head_dim=64,
            rope_dim=32,
            split_kv_b=False,
            q_lora_rank=64,
            yarn_factor=4.0,
        ),
    ],
    ids=["qwen3moe", "qwen2moe", "mixtral", "olmoe", "glm4moe", "deepseek2", "deepseek3", "deepseek2-old-kv_b-yarn"],
)
def test_generated_models_mean_the_same_to_llama_cpp(
    generated: Callable[[Shape], GeneratedModel], shape: Shape
) -> None:
    """The metadata we rebuild a configuration from is read by llama.cpp as well: both must compute one model."""
    model = generated(shape)
    ours = load_model(model.path, option_overrides={"cpu_backend": "torch_reference"}, progress=False).model
    llama_cpp = LlamaCpp(model.path)
    prompt = [(37 * at + 11) % 250 for at in range(60)]
    compared = 0
    for length in range(1, 60, 3):
        wanted = llama_cpp.next_token(prompt[:length])
        found = torch.log_softmax(logits_of(ours, prompt[:length])[-1], dim=-1)
        for token, value in wanted.items():
            assert abs(found[token].item() - value) < 0.01, (
                f"{length} tokens: {token} {value} there, {found[token]} here"
            )
            compared += 1
    assert compared >= 20, "hardly any prompt could be compared"
