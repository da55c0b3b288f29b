"""DecodeAttention is the module that it replaces, except in steps whose length stands in a tensor."""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, Gemma2Config, Llama4TextConfig, Qwen3MoeConfig
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention
from transformers.models.llama4.modeling_llama4 import Llama4TextAttention
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeAttention, Qwen3MoeRotaryEmbedding

from hybrimoe_kt.engine.memory.growing_cache import growing_cache
from hybrimoe_kt.errors import ConfigError, HostCompatibilityError
from hybrimoe_kt.operators.attention import DecodeAttention
from tests.support.fixed_cache import fix_lengths

KEY, HIDDEN, HELD = "model.layers.0.self_attn", 96, 9


def config(**given: Any) -> Qwen3MoeConfig:
    made = Qwen3MoeConfig(
        hidden_size=HIDDEN, num_attention_heads=6, num_key_value_heads=2, head_dim=32, num_hidden_layers=1, **given
    )
    made._attn_implementation = "sdpa"
    return made


def built(settings: Qwen3MoeConfig) -> tuple[nn.Module, DecodeAttention]:
    torch.manual_seed(0)
    stock = Qwen3MoeAttention(settings, 0).eval()
    return copy.deepcopy(stock), DecodeAttention(KEY, None, settings, stock)


class Conversation:
    """Runs tokens through a module, with a cache of its own."""

    def __init__(self, module: nn.Module, settings: Qwen3MoeConfig) -> None:
        self.module, self.rotary = module, Qwen3MoeRotaryEmbedding(settings)
        self.cache, self.at = DynamicCache(config=settings), 0

    @torch.inference_mode()
    def step(self, tokens: int, mask: torch.Tensor | None = None) -> torch.Tensor:
        hidden = torch.randn(1, tokens, HIDDEN, generator=torch.Generator().manual_seed(self.at))
        angles = self.rotary(hidden, torch.arange(self.at, self.at + tokens)[None])
        self.at += tokens
        answer, _ = self.module(
            hidden_states=hidden, position_embeddings=angles, attention_mask=mask, past_key_values=self.cache
        )
        return answer


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_ordinary_steps_are_the_stock_modules(implementation: str) -> None:
    settings = config()
    settings._attn_implementation = implementation
    stock, ours = (Conversation(module, settings) for module in built(settings))
    causal = torch.full((HELD, HELD), torch.finfo(torch.float32).min).triu(1)[None, None]
    for tokens, mask in ((HELD, causal), (1, None), (1, None)):
        assert torch.equal(ours.step(tokens, mask), stock.step(tokens, mask))


@pytest.mark.parametrize("window", [None, 4])
def test_fixed_steps_answer_as_ordinary_ones(window: int | None) -> None:
    """With a mask that hides everything, to a module whose model goes on asking for another function."""
    settings = config(sliding_window=window, use_sliding_window=window is not None)
    stock, ours = (Conversation(module, settings) for module in built(settings))
    stock.cache, ours.cache = DynamicCache(), DynamicCache()  # which keep more than a window
    stock.module.sliding_window = ours.module.sliding_window = window
    causal = torch.full((HELD, HELD), torch.finfo(torch.float32).min).triu(1)[None, None]
    assert torch.equal(ours.step(HELD, causal), stock.step(HELD, causal))
    length = fix_lengths(ours.cache, 32)
    for _ in range(4):
        length.fill_(ours.at + 1)
        seen = torch.zeros(1, 1, 1, stock.at + 1)
        if window:
            seen[..., : stock.at + 1 - window] = torch.finfo(torch.float32).min
        wanted = stock.step(1, seen if window else None)
        torch.testing.assert_close(ours.step(1, torch.full((1, 1, 1, 32), -1e9)), wanted, rtol=0, atol=1e-6)
    assert ours.module.stock.config is settings and settings._attn_implementation == "sdpa"


def test_parts_are_shared_with_the_replaced_module() -> None:
    """What is loaded or replaced in one is in the other; its widths can be asked for."""
    _, ours = built(config())
    other = nn.Linear(HIDDEN, HIDDEN)
    ours.q_proj = other
    assert ours.stock.q_proj is other and ours.head_dim == 32
    assert ours.state_dict().keys() == ours.stock.state_dict().keys()
    assert not any(isinstance(module, Qwen3MoeAttention) for module in ours.modules())
    ours.scaling, ours.kernel = 0.5, "sdpa"
    assert ours.stock.scaling == 0.5 and not hasattr(ours.stock, "kernel")
    ours.train()
    assert ours.stock.training
    with pytest.raises(AttributeError, match="nothing_such"):
        _ = ours.nothing_such


class Plain(nn.Module):
    layer_idx = 0

    def forward(self, hidden_states: torch.Tensor, past_key_values: Any = None) -> torch.Tensor:
        return hidden_states + 1


def test_a_module_that_cannot_be_served_stays_what_it_is() -> None:
    """A packaged file for unknown architectures names every attention; its steps are refused when they are fixed."""
    ours = DecodeAttention(KEY, None, config(), Plain())
    assert ours.refusal == "Plain has no groups of query heads"
    assert torch.equal(ours(torch.zeros(2)), torch.ones(2))
    settings = config()
    talk = Conversation(built(settings)[1], settings)
    talk.step(3)
    fix_lengths(talk.cache, 8)
    with pytest.raises(HostCompatibilityError, match=f"{KEY}: Plain has no groups of query heads, so it takes no step"):
        ours(torch.zeros(2), past_key_values=talk.cache)


@pytest.mark.parametrize(("cap", "reason"), [(50.0, "it caps its scores"), (None, None), (0.0, None)])
def test_attention_that_caps_its_scores_takes_no_fixed_step(cap: float | None, reason: str | None) -> None:
    settings = Gemma2Config(num_hidden_layers=1, attn_logit_softcapping=cap)
    assert DecodeAttention(KEY, None, settings, Gemma2Attention(settings, 0)).refusal == reason


class Biased(Qwen3MoeAttention):
    __module__ = Qwen3MoeAttention.__module__  # which asks Transformers who attends

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        bias = hidden_states.new_zeros(1)
        return kwargs["attend"](self, hidden_states, scaling=self.scaling, dropout=0.0, position_bias=bias)


@pytest.mark.parametrize(
    ("chunk", "is_tempered", "reason"),
    [
        (8, False, "its model attends in chunks of positions, which only a mask says"),
        (None, True, "its queries grow with their position, which is counted on the host"),
        (None, False, None),
    ],
)
def test_attention_by_positions_takes_neither_fixed_steps_nor_prompts_without_a_mask(
    chunk: int | None, is_tempered: bool, reason: str | None
) -> None:
    """Llama 4's, in its layers of either kind."""
    settings = Llama4TextConfig(
        num_hidden_layers=4, attention_chunk_size=chunk, attn_temperature_tuning=is_tempered, hidden_size=HIDDEN,
        num_attention_heads=6, num_key_value_heads=2, head_dim=32,
    )  # fmt: skip
    for layer in (0, 3):
        assert DecodeAttention(KEY, None, settings, Llama4TextAttention(settings, layer)).refusal == reason


def test_nor_does_attention_that_is_told_more_than_we_know() -> None:
    """Which would be left out of the answer without a word."""
    ours = DecodeAttention(KEY, None, config(), Biased(config(), 0))
    assert ours.refusal == "Biased attends with position_bias"


def test_one_token_of_one_conversation_is_a_fixed_step() -> None:
    settings = config()
    ours = Conversation(built(settings)[1], settings)
    ours.step(3)
    fix_lengths(ours.cache, 16).fill_(5)
    ours.cache.layers[0].update = lambda keys, values, *rest, **more: (keys, values)  # type: ignore[method-assign]
    with pytest.raises(HostCompatibilityError, match="one token of one conversation"):
        ours.step(2)


def test_unknown_kernels_and_those_that_cannot_run_are_refused() -> None:
    settings = config()
    with pytest.raises(ConfigError, match="unknown kernel 'tritn', did you mean 'triton'"):
        DecodeAttention(KEY, None, settings, Qwen3MoeAttention(settings, 0), kernel="tritn")
    with pytest.raises(ConfigError, match="kernel is 'flashinfer', but FlashInfer has kernels for CUDA, not for cpu"):
        DecodeAttention(KEY, None, settings, Qwen3MoeAttention(settings, 0), kernel="flashinfer")


@pytest.mark.slow
@torch.inference_mode()
def test_a_fixed_step_of_a_long_conversation_takes_as_long_as_an_ordinary_one() -> None:
    """At 32,768 tokens in a room of 40,960: neither copies the room. Least of alternating steps, measured alike."""
    settings, held = config(), 32768
    talks = [Conversation(built(settings)[1], settings) for _ in range(2)]
    for talk in talks:
        talk.cache = growing_cache(settings)
        talk.cache.update(*torch.randn(2, 1, 2, held, 32, generator=torch.Generator().manual_seed(0)), 0)
    length = fix_lengths(talks[1].cache, 40960)
    times: list[list[float]] = [[], []]
    for at in range(held, held + 12):
        length.fill_(at + 1)
        for talk, taken in zip(talks, times, strict=True):
            talk.at, began = at, time.perf_counter()
            talk.step(1, torch.zeros(1, 1, 1, at + 1) if talk is talks[1] else None)
            taken.append(time.perf_counter() - began)
    ordinary, fixed = map(min, times)
    assert fixed < 1.3 * ordinary
