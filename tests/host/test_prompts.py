"""Prompts whose attention is not the model's own code's: what it reads, and that answers stay what they were."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hybrimoe_kt.backends.attention_protocol import AskedPrompt
from hybrimoe_kt.backends.prompt_attention import PromptAttention, TorchPrompts
from hybrimoe_kt.backends.sdpa_attention import read_latents
from hybrimoe_kt.engine.memory.growing_cache import growing_cache
from hybrimoe_kt.host.hf.loading import load_model
from hybrimoe_kt.operators import attention
from hybrimoe_kt.operators.attention import DecodeAttention
from hybrimoe_kt.operators.attention_mla import AbsorbedMLA
from tests.support.generated_model import GeneratedModel, Shape

from .test_equality import SHAPES

OPTIONS = {"accelerator": "emulated", "cpu_backend": "torch_reference", "cache_size": "all"}
CHUNKS = [random.Random(seed).choices(range(250), k=count) for seed, count in enumerate((9, 1, 7, 2))]
ATTENDING = ["qwen3moe", "deepseek2", "deepseek3", "glm4moe", "qwen3next"]


class Reader(TorchPrompts):
    """Torch's, and latents as they are read in steps; notes how many tokens it was given."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def refuses(self, asked: AskedPrompt) -> str | None:
        return None if asked.is_latent else super().refuses(asked)

    def attend(self, asked: AskedPrompt) -> torch.Tensor:
        tokens, length = asked.query.shape[2], asked.keys.shape[2]
        self.asked.append((tokens, length))
        if asked.rotated_query is None:
            return super().attend(asked)
        seen = torch.ones(tokens, length, dtype=torch.bool).tril(length - tokens)
        parts = asked.keys[:, 0], asked.values[:, 0]
        return read_latents(asked.query, asked.rotated_query, *parts, seen, asked.scaling)


def answers(model: Any, cache: Any) -> torch.Tensor:
    """Logits of all tokens, chunk after chunk."""
    return torch.cat(
        [model(input_ids=torch.tensor([chunk]), use_cache=True, past_key_values=cache).logits[0] for chunk in CHUNKS]
    )


@pytest.mark.parametrize("name", ATTENDING)
@torch.inference_mode()
def test_chunks_of_a_prompt_are_read_without_a_mask(
    generated: Callable[[Shape], GeneratedModel], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = load_model(generated(SHAPES[name]).path, option_overrides=OPTIONS, progress=False).model
    wanted = answers(model, growing_cache(model.config))
    reader = Reader()
    prompts = PromptAttention(torch.device("cpu"), [reader])
    monkeypatch.setattr(attention, "prompts_on", lambda device, kernel: prompts)
    found = answers(model, growing_cache(model.config))
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-4)
    assert wanted.std() > 0.3
    layers = sum(isinstance(module, DecodeAttention | AbsorbedMLA) for module in model.modules())
    trials = [(5, 83)]
    assert reader.asked == [*trials, *[(9, 9)] * layers, *[(7, 17)] * layers, *[(2, 19)] * layers]


@torch.inference_mode()
def test_where_nobody_else_attends_the_models_own_code_does(
    generated: Callable[[Shape], GeneratedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = load_model(generated(SHAPES["qwen3moe"]).path, option_overrides=OPTIONS, progress=False).model
    wanted = answers(model, growing_cache(model.config))
    monkeypatch.setattr(attention, "prompts_on", lambda device, kernel: PromptAttention(device, []))
    assert torch.equal(answers(model, growing_cache(model.config)), wanted)


@torch.inference_mode()
def test_a_padded_batch_keeps_its_mask(
    generated: Callable[[Shape], GeneratedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With Transformers' own cache, of which nobody says what it holds."""
    model: Any = load_model(generated(SHAPES["qwen3moe"]).path, option_overrides=OPTIONS, progress=False).model
    ids, mask = torch.tensor([CHUNKS[0]]), torch.ones(1, 9, dtype=torch.int64)
    mask[0, :3] = 0
    wanted = model(input_ids=ids, attention_mask=mask, use_cache=True).logits
    reader = Reader()
    monkeypatch.setattr(attention, "prompts_on", lambda device, kernel: PromptAttention(device, [reader]))
    assert torch.equal(model(input_ids=ids, attention_mask=mask, use_cache=True).logits, wanted)
    assert not reader.asked
