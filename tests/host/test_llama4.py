"""Llama 4: chunks of positions and tempered attention beyond them, and experts of weighed inputs."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from hybrimoe_kt.engine.token_generator import TokenGenerator
from hybrimoe_kt.errors import ConfigError, RuleError
from hybrimoe_kt.host.hf.loading import load_model
from hybrimoe_kt.operators.experts import HybriMoEExperts
from hybrimoe_kt.operators.weighed_input import WeighedInputBlock

from .families import FAMILIES
from .stock import logits_of

TEXT = random.Random(9).choices(range(250), k=70)
EXACT = {"cpu_backend": "torch_reference", "accelerator": "none"}


def small(**changed: Any) -> Any:
    """A stock model with chunks of 16 positions, attention tempered every 4."""
    values = FAMILIES["llama4"].values | {"attention_chunk_size": 16, "floor_scale": 4, "attn_scale": 0.5} | changed
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama4_text", **values)).float().eval()
    for parameter in made.parameters():
        if parameter.dim() > 1:
            parameter.data = torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5
    return made


@pytest.mark.parametrize("normed", [pytest.param(True, marks=pytest.mark.slow), False], ids=["scout", "maverick"])
def test_beyond_chunks_in_pieces(tmp_path: Path, normed: bool) -> None:
    stock = small(use_qk_norm=normed)
    stock.save_pretrained(tmp_path)
    ours = load_model(tmp_path, option_overrides=EXACT, progress=False)
    wanted = logits_of(stock, TEXT)
    for size in (1, 7, 70):
        engine = TokenGenerator(ours, set())
        for at in range(0, len(TEXT), size):
            piece = TEXT[at : at + size]
            torch.testing.assert_close(engine.append(piece), wanted[at + len(piece) - 1], rtol=0, atol=1e-3)


def test_a_conversation_goes_back(tmp_path: Path) -> None:
    """All keys are kept, chunks or not."""
    stock = small()
    stock.save_pretrained(tmp_path)
    engine = TokenGenerator(load_model(tmp_path, option_overrides=EXACT, progress=False), set())
    engine.append(TEXT)
    assert engine.go_on_from([*TEXT[:30], 7, 8, 9]) == 30
    found = engine.append([7, 8, 9])
    torch.testing.assert_close(found, logits_of(stock, [*TEXT[:30], 7, 8, 9])[-1], rtol=0, atol=1e-3)


def test_two_experts_a_token_are_refused(tmp_path: Path) -> None:
    small(num_experts_per_tok=2).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="weighs what enters one expert a token, this model routes to 2"):
        load_model(tmp_path, progress=False)


def test_another_module_is_refused() -> None:
    with pytest.raises(ConfigError, match="replaces a MoE block with a router, found Linear"):
        WeighedInputBlock("model.layers.1.feed_forward", None, None, nn.Linear(2, 2))


def test_experts_without_their_block_are_refused(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path / "model")
    rules = tmp_path / "experts.yaml"
    experts = f"{HybriMoEExperts.__module__}.{HybriMoEExperts.__name__}"
    rules.write_text(f"- match: {{name: experts$}}\n  replace: {{class: {experts}}}\n  recursive: false\n")
    with pytest.raises(RuleError, match=r"need a rule that gives the block to .*WeighedInputBlock"):
        load_model(tmp_path / "model", rules_path=rules, progress=False)
