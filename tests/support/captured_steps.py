"""Conversations whose single tokens are captured pieces, and the same ones asked of the modules; for tests."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch

from hybrimoe_kt.engine.steps.captured_loop import CapturedLoop
from hybrimoe_kt.engine.token_generator import TokenGenerator
from hybrimoe_kt.host.hf.loading import LoadedModel, load_model
from tests.support.generated_model import GeneratedModel, Shape

__all__ = ["EXACT", "PROMPT", "Make", "check", "decode", "generator", "load", "loop_of"]

Make = Callable[[Shape], GeneratedModel]
PROMPT = random.Random(5).choices(range(250), k=11)
EXACT: dict[str, Any] = {
    "accelerator": "emulated", "cpu_backend": "torch_reference", "gpu_backend": "torch_reference",
    "cache_size": 0.5, "prefetch_size": 2,
}  # fmt: skip


def load(model: GeneratedModel, **options: Any) -> LoadedModel:
    own = {name: options.pop(name) for name in ("kv_cache_type", "assemble", "rules_path") if name in options}
    given = EXACT | options
    return load_model(model.path, device="emulated:0", option_overrides=given, progress=False, **own)


def generator(loaded: LoadedModel, *, captures: bool) -> TokenGenerator:
    """One whose single tokens are fixed steps, captured or not."""
    made = TokenGenerator(loaded, set(), captures=True)
    assert isinstance(made.loop, CapturedLoop)
    made.loop.captures = captures
    return made


def loop_of(made: TokenGenerator) -> CapturedLoop:
    assert isinstance(made.loop, CapturedLoop)
    return made.loop


def decode(made: TokenGenerator, num_tokens: int, prompt: list[int] = PROMPT) -> torch.Tensor:
    """Logits of the prompt's last token and of so many greedy ones, `[num_tokens + 1, vocab]`."""
    rows = [made.append(prompt).clone()]
    for _ in range(num_tokens):
        rows.append(made.append([int(rows[-1].argmax())]).clone())
    return torch.stack(rows)


def check(model: GeneratedModel, num_tokens: int, **options: Any) -> TokenGenerator:
    """Captured and eager fixed steps agree in every bit, and both with steps of Transformers' own cache."""
    wanted = decode(generator(load(model, **options), captures=False), num_tokens)
    made = generator(load(model, **options), captures=True)
    found = decode(made, num_tokens)
    assert torch.equal(found, wanted)
    assert wanted.std() > 0.3, "a model whose logits are all alike would prove nothing"
    usual = TokenGenerator(load(model, **options), set())
    assert usual.loop is None
    few = min(num_tokens, 12)
    torch.testing.assert_close(decode(usual, few), wanted[: few + 1], rtol=0, atol=1e-4)
    return made
