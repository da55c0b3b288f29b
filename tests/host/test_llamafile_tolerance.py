"""With kt-kernel the model may round differently, by a measured amount and no more."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hybrimoe_kt.host.hf.loading import load_model
from tests.support.generated_model import GeneratedModel, Shape, Type

from .stock import greedy, logits_of, stock_model
from .test_equality import PROMPT, SHAPES

pytest.importorskip("kt_kernel", reason="kt-kernel is not installed")

TOLERANCE = 0.1
"""Largest |difference| of a logit over the standard deviation of the logits, two or three layers, all prompts here.

Measured 0.0004 (F16) to 0.048 (Q4_K with Q6_K) with kt-kernel 0.7.2 on AVX2, which rounds activations to 8 bits;
doubled for other instruction sets.
"""


@pytest.mark.parametrize(
    "types", [(Type.Q8_0,) * 3, (Type.Q4_K, Type.Q4_K, Type.Q6_K), (Type.F16,) * 3], ids=["q8_0", "q4_k-q6_k", "f16"]
)
@pytest.mark.parametrize("shape", ["qwen3moe", "deepseek2"])
@pytest.mark.parametrize(
    "place", [{"accelerator": "none"}, {"accelerator": "emulated", "cache_size": 1}], ids=["none", "emulated"]
)
def test_logits_stay_within_the_tolerance(
    generated: Callable[[Shape], GeneratedModel], shape: str, types: tuple[Type, ...], place: dict[str, Any]
) -> None:
    # Every expert of every token, so that no rounding chooses another one.
    model = generated(dataclasses.replace(SHAPES[shape], types=types, experts=4, top_k=4))
    stock = stock_model(model)
    ours = load_model(model.path, option_overrides={"cpu_backend": "llamafile", **place}, progress=False).model
    wanted = logits_of(stock, PROMPT)
    error = (logits_of(ours, PROMPT) - wanted).abs().max() / wanted.std()
    print(f"measured {error:.4f}")
    assert error < TOLERANCE
    assert error > 0 or "cache_size" in place, "exactly equal: kt-kernel computed nothing"

    tokens, rows = greedy(stock, PROMPT, 12)
    found, _ = greedy(ours, PROMPT, 12)
    first = next((at for at, (a, b) in enumerate(zip(tokens, found, strict=True)) if a != b), None)
    if first is not None:
        top = rows[first].topk(2).values
        assert top[0] - top[1] < 2 * TOLERANCE * rows[first].std(), f"token {first} differs although it was clear"


def test_a_padded_expert_width_changes_nothing(generated: Callable[[Shape], GeneratedModel]) -> None:
    """DeepSeek-V2-Lite's 1408 is not a multiple of 256: kt-kernel gets a zero-padded copy."""
    model = generated(Shape(architecture="deepseek2", layers=2, inter=384, types=(Type.Q4_K, Type.Q4_K, Type.Q5_0)))
    wanted = logits_of(stock_model(model), PROMPT)
    ours = load_model(
        model.path, option_overrides={"cpu_backend": "llamafile", "accelerator": "none"}, progress=False
    ).model
    error = (logits_of(ours, PROMPT) - wanted).abs().max() / wanted.std()
    assert 0 < error < TOLERANCE
    assert torch.isfinite(error)
