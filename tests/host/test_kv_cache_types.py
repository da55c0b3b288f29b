"""Keys and values kept in another type than the model's, where Transformers' own layers compute as on a GPU."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrimoe_kt.engine.memory.growing_cache import layer_bytes
from hybrimoe_kt.engine.sampling import Sampling
from hybrimoe_kt.engine.token_generator import TokenGenerator
from hybrimoe_kt.errors import ConfigError
from hybrimoe_kt.host.hf.loading import load_model
from tests.support.generated_model import GeneratedModel, Shape

from .test_equality import SHAPES

Make = Callable[[Shape], GeneratedModel]

TEXT = random.Random(11).choices(range(250), k=120)
GREEDY = Sampling(max_new_tokens=8, temperature=0)
PLAIN = Shape(experts=4, top_k=4, head_dim=64)
"""Every expert of every token: no rounding chooses another."""
LATENT = dataclasses.replace(SHAPES["deepseek2"], experts=4, top_k=4, rope_dim=32)


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rules") / "rules.yaml"
    file.write_text(
        "- match: {name: ^model\\.layers\\.\\d+\\.mlp\\.experts$}\n"
        "  replace: {class: hybrimoe_kt.operators.experts.HybriMoEExperts}\n"
        "- match: {class: transformers.models.deepseek_v2.modeling_deepseek_v2.DeepseekV2Attention}\n"
        "  replace: {class: hybrimoe_kt.operators.attention_mla.AbsorbedMLA}\n"
    )
    return file


def generator(model: GeneratedModel, rules: Path, kv_cache_type: str | None, **given: Any) -> TokenGenerator:
    options = {"cpu_backend": "torch_reference", "accelerator": "none", "max_chunk_tokens": 32}
    loaded = load_model(
        model.path, rules_path=rules, option_overrides=options, progress=False, kv_cache_type=kv_cache_type, **given
    )
    return TokenGenerator(loaded, set())


@pytest.mark.parametrize("shape", [PLAIN, LATENT], ids=["keys", "latents"])
@pytest.mark.parametrize(("kv_cache_type", "within"), [("f16", 0.001), ("bf16", 0.004), ("q8_0", 0.01)])
def test_rounded_keys_change_logits_by_little(
    generated: Make, rules: Path, shape: Shape, kv_cache_type: str, within: float
) -> None:
    """Of the range. Measured at most 0.0001, 0.0006 and 0.0021."""
    model = generated(shape)
    plain, rounded = generator(model, rules, None), generator(model, rules, kv_cache_type)
    for at in range(0, len(TEXT), 40):
        wanted, found = plain.append(TEXT[at : at + 40]).clone(), rounded.append(TEXT[at : at + 40])
        off = float((found - wanted).abs().max() / (wanted.max() - wanted.min()))
        assert 0 < off <= within, off
    assert rounded.cache_bytes < plain.cache_bytes


def test_a_bfloat16_model_keeps_bfloat16_exactly(generated: Make, rules: Path) -> None:
    engines = [generator(generated(PLAIN), rules, kept, dtype=torch.bfloat16) for kept in (None, "bf16", "auto")]
    for at in range(0, len(TEXT), 40):
        wanted, *others = [engine.append(TEXT[at : at + 40]).clone() for engine in engines]
        assert all(torch.equal(wanted, found) for found in others)
    assert len({engine.cache_bytes for engine in engines}) == 1


@pytest.mark.parametrize("kv_cache_type", ["f16", "q8_0"])
def test_a_prefix_is_cropped_and_reused(generated: Make, rules: Path, kv_cache_type: str) -> None:
    """A token's block depends on that token alone, so that what is reused is what would be computed again."""
    engine, fresh = (generator(generated(PLAIN), rules, kv_cache_type) for _ in range(2))
    other = [(3 * token + 1) % 250 for token in TEXT]
    for kept, size in ((64, 5), (96, 1), (32, 60)):
        prompt = TEXT[: kept + size]
        list(engine.tokens([*TEXT[:kept], *other[kept : kept + 20]], GREEDY))
        assert engine.go_on_from(prompt) == kept
        fresh.reset()
        fresh.append(TEXT[:kept])
        wanted, found = fresh.append(prompt[kept:]).clone(), engine.append(prompt[kept:])
        assert (found - wanted).abs().max() <= 1e-3 * (wanted.max() - wanted.min())


def test_memory_is_taken_for_the_context_and_no_more(generated: Make, rules: Path) -> None:
    loaded = generator(generated(PLAIN), rules, "q8_0").loaded
    engine = TokenGenerator(loaded, set(), context_tokens=100)
    engine.append(TEXT[:99])
    (each,) = {layer_bytes(layer) for layer in engine.conversation.cache.layers}
    assert each == 100 * 2 * PLAIN.kv_heads * 64 * 34 // 32


def test_what_cannot_be_kept_is_refused_by_name(generated: Make, rules: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown kv_cache_type 'q4_0'.*valid: auto, bf16, f16, f32, q8_0"):
        generator(generated(PLAIN), rules, "q4_0")
    with pytest.raises(ConfigError, match="q8_0 takes heads a multiple of 32 wide, these are 48"):
        generator(generated(Shape(head_dim=48)), rules, "q8_0")
