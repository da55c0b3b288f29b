"""Steps whose length stands in a tensor: for every family, the bits of ordinary ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hybrimoe_kt.backends.decode_attention import attention_on
from hybrimoe_kt.engine.growing_cache import growing_cache
from hybrimoe_kt.host.hf.loading import load_model
from hybrimoe_kt.operators.attention import DecodeAttention
from hybrimoe_kt.operators.attention_mla import AbsorbedMLA
from tests.support.fixed_cache import FixedLayer, fix_lengths
from tests.support.generated_model import GeneratedModel, Shape

from .test_equality import PROMPT, SHAPES

NUM_STEPS, ROOM = 5, 64


def step(model: Any, cache: Any, token: int, position: int, mask: torch.Tensor | None = None) -> torch.Tensor:
    answer = model(
        input_ids=torch.tensor([[token]]), past_key_values=cache, position_ids=torch.tensor([[position]]),
        attention_mask=mask, use_cache=True,
    )  # fmt: skip
    return answer.logits[0, -1]


def prompted(model: Any) -> Any:
    cache = growing_cache(model.config)
    model(input_ids=torch.tensor([PROMPT]), past_key_values=cache, use_cache=True)
    return cache


@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_fixed_steps_equal_ordinary_ones(generated: Callable[[Shape], GeneratedModel], shape: str) -> None:
    """Bit for bit, in rooms that hold NaN behind the last token, with a mask that hides everything."""
    options = {"accelerator": "emulated", "cpu_backend": "torch_reference", "cache_size": "all"}
    model: Any = load_model(generated(SHAPES[shape]).path, option_overrides=options, progress=False).model
    ordinary, fixed = prompted(model), prompted(model)
    length = fix_lengths(fixed, ROOM)
    layers = [layer for layer in fixed.layers if isinstance(layer, FixedLayer)]
    attentions = [module for module in model.modules() if isinstance(module, DecodeAttention | AbsorbedMLA)]
    assert len(layers) == len(attentions) > 0
    hidden = torch.full((1, 1, 1, ROOM), torch.finfo(torch.float32).min)
    for at, token in enumerate(torch.randint(0, 250, (NUM_STEPS,)).tolist()):
        position = len(PROMPT) + at
        wanted = step(model, ordinary, token, position)
        length.fill_(position + 1)
        assert torch.equal(step(model, fixed, token, position, hidden), wanted), at
    assert ordinary.get_seq_length(attentions[0].layer_idx) == len(PROMPT) + NUM_STEPS
    assert attention_on(torch.device("cpu")).chosen() == ["sdpa"]


@pytest.mark.kernels
@pytest.mark.parametrize("shape", ["qwen3moe", "deepseek2"])
@torch.inference_mode()
def test_kernels_answer_alike(generated: Callable[[Shape], GeneratedModel], shape: str) -> None:
    """The rule's other choice, in Triton's interpreter, with a cache of float16."""
    pytest.importorskip("triton")
    options = {"accelerator": "emulated", "cpu_backend": "torch_reference", "cache_size": "all"}
    model: Any = load_model(generated(SHAPES[shape]).path, option_overrides=options, progress=False).model
    for module in model.modules():
        if isinstance(module, DecodeAttention | AbsorbedMLA):
            module.kernel = "triton"
    ordinary, fixed = prompted(model), prompted(model)
    length = fix_lengths(fixed, ROOM, torch.float16)
    length.fill_(len(PROMPT) + 1)
    wanted = step(model, ordinary, 7, len(PROMPT))
    found = step(model, fixed, 7, len(PROMPT), torch.zeros(1, 1, 1, ROOM))
    assert (found - wanted).norm() < 1e-2 * wanted.norm()
    assert "triton" in attention_on(torch.device("cpu"), "triton").chosen()
