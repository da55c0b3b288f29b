"""Steps whose length stands in a tensor: for every family, the bits of ordinary ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from hybrimoe_kt.backends.decode_attention import attention_on
from hybrimoe_kt.engine.memory.growing_cache import growing_cache
from hybrimoe_kt.engine.memory.growing_layers import GrowingLayer, RoomLayer
from hybrimoe_kt.host.hf.fixed_steps import layers_read_as_kept
from hybrimoe_kt.host.hf.loading import load_model
from hybrimoe_kt.kv_cache_types import KV_CACHE_TYPES
from hybrimoe_kt.operators.attention import DecodeAttention
from hybrimoe_kt.operators.attention_mla import AbsorbedMLA
from tests.support.attention import chosen
from tests.support.fixed_cache import FixedLayer, fix_lengths
from tests.support.generated_model import GeneratedModel, Shape

from .test_equality import PROMPT, SHAPES

NUM_STEPS, ROOM = 5, 64
OPTIONS = {"accelerator": "emulated", "cpu_backend": "torch_reference", "cache_size": "all"}


def step(model: Any, cache: Any, token: int, position: int, mask: torch.Tensor | None = None) -> torch.Tensor:
    answer = model(
        input_ids=torch.tensor([[token]]), past_key_values=cache, position_ids=torch.tensor([[position]]),
        attention_mask=mask, use_cache=True,
    )  # fmt: skip
    return answer.logits[0, -1]


def prompted(model: Any, kv_cache_type: str = "auto") -> Any:
    cache = growing_cache(model.config, kv_cache_type=kv_cache_type)
    model(input_ids=torch.tensor([PROMPT]), past_key_values=cache, use_cache=True)
    return cache


@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_fixed_steps_equal_ordinary_ones(generated: Callable[[Shape], GeneratedModel], shape: str) -> None:
    """Bit for bit, in rooms that hold NaN behind the last token, with a mask that hides everything."""
    model: Any = load_model(generated(SHAPES[shape]).path, option_overrides=OPTIONS, progress=False).model
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
    assert chosen(attention_on(torch.device("cpu"))) == ["sdpa"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kept", ["f16", "bf16", "f32", "q8_0"])
@pytest.mark.parametrize("shape", ["qwen3moe", "qwen3next", "deepseek2"])
@torch.inference_mode()
def test_whatever_keys_are_kept_in(
    generated: Callable[[Shape], GeneratedModel], shape: str, kept: str, dtype: torch.dtype
) -> None:
    """Bit for bit, read as they are kept or, as by Transformers' own attention, converted."""
    own = replace(SHAPES[shape], rope_dim=32) if shape == "deepseek2" else SHAPES[shape]  # as blocks have it
    model: Any = load_model(generated(own).path, option_overrides=OPTIONS, dtype=dtype, progress=False).model
    ordinary, *fixed = (prompted(model, kept) for _ in range(3))
    length, place = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    ours = layers_read_as_kept(model)
    assert ours == {number for number, layer in enumerate(ordinary.layers) if isinstance(layer, RoomLayer)}
    seen: list[tuple[bool, torch.dtype]] = []
    update = GrowingLayer.update

    def updated(layer: GrowingLayer, *given: Any, **more: Any) -> Any:
        answer = update(layer, *given, **more)
        seen.append((layer.is_read_as_kept, answer[0].dtype))
        return answer

    for at, token in enumerate(torch.randint(0, 250, (NUM_STEPS,)).tolist()):
        position = len(PROMPT) + at
        wanted = step(model, ordinary, token, position)
        length.fill_(position + 1), place.fill_(position)
        for cache, read_as_kept in zip(fixed, (ours, frozenset()), strict=True):
            cache.fix(place, length, read_as_kept)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(GrowingLayer, "update", updated)
                assert torch.equal(step(model, cache, token, position, torch.zeros(1, 1, 1, cache.room)), wanted), at
            cache.unfix(1)
    if kept != "q8_0":
        memory = getattr(torch, KV_CACHE_TYPES[kept].dtype or "")
        assert set(seen) == {(True, memory), (False, dtype)}


@pytest.mark.kernels
@pytest.mark.parametrize("shape", ["qwen3moe", "deepseek2"])
@torch.inference_mode()
def test_kernels_answer_alike(generated: Callable[[Shape], GeneratedModel], shape: str) -> None:
    """The rule's other choice, in Triton's interpreter, with a bfloat16 model and a cache of float16."""
    pytest.importorskip("triton")
    model: Any = load_model(
        generated(SHAPES[shape]).path, option_overrides=OPTIONS, dtype=torch.bfloat16, progress=False
    ).model
    for module in model.modules():
        if isinstance(module, DecodeAttention | AbsorbedMLA):
            module.kernel = "triton"
    ordinary, fixed = prompted(model), prompted(model)
    length = fix_lengths(fixed, ROOM, torch.float16)
    length.fill_(len(PROMPT) + 1)
    wanted = step(model, ordinary, 7, len(PROMPT))
    found = step(model, fixed, 7, len(PROMPT), torch.zeros(1, 1, 1, ROOM))
    assert (found - wanted).norm() < 2e-2 * wanted.norm()  # measured 0.0101
    assert "triton" in chosen(attention_on(torch.device("cpu"), "triton"))
