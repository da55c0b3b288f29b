"""The cache with room to grow answers as Transformers' own does, whatever is appended, cropped and begun anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, Qwen3MoeConfig, Qwen3NextConfig
from transformers.cache_utils import LinearAttentionLayer

from hybrimoe_kt.engine.memory.growing_cache import growing_cache, layer_bytes
from hybrimoe_kt.engine.memory.growing_layers import GrowingLayer
from hybrimoe_kt.engine.memory.quantized_states import QuantizedStates
from hybrimoe_kt.kv_cache_types import KV_CACHE_TYPES

CONFIG = Qwen3MoeConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
OPERATIONS = st.lists(st.one_of(st.integers(1, 400), st.integers(-300, -1), st.just(0)), min_size=1, max_size=12)


ROUNDED = {"auto": 0.0, "f32": 0.0, "f16": 2**-11, "bf16": 2**-8, "q8_0": 0.51 / 127}
"""By how much of the largest number of a block a number may be off."""


@pytest.mark.parametrize("kv_cache_type", KV_CACHE_TYPES)
@settings(max_examples=25, deadline=None)
@given(operations=OPERATIONS, seed=st.integers(0, 99), limit=st.sampled_from([None, 300, 5000]))
def test_whatever_is_done_to_it_it_holds_what_the_stock_one_does(
    kv_cache_type: str, operations: list[int], seed: int, limit: int | None
) -> None:
    """A positive number appends so many tokens, a negative one crops as many, 0 begins anew."""
    generator = torch.Generator().manual_seed(seed)

    def fresh() -> tuple[DynamicCache, DynamicCache]:
        return growing_cache(CONFIG, kv_cache_type=kv_cache_type, most_tokens=limit), DynamicCache(config=CONFIG)

    ours, stock = fresh()
    for operation in operations:
        if operation == 0:
            ours, stock = fresh()
        elif operation < 0:
            surplus = min(-operation, stock.get_seq_length())
            if surplus:
                ours.crop(-surplus), stock.crop(-surplus)
        else:
            for layer in range(2):
                new = [torch.randn(1, 2, operation, width, generator=generator) for width in (64, 32)]
                for found, wanted in zip(ours.update(*new, layer), stock.update(*new, layer), strict=True):
                    assert found.dtype == wanted.dtype
                    off = (found - wanted).unflatten(-1, (-1, 32)).abs().amax(-1)
                    largest = wanted.unflatten(-1, (-1, 32)).abs().amax(-1)
                    assert (off <= largest * ROUNDED[kv_cache_type]).all()
        assert ours.get_seq_length() == stock.get_seq_length()


def test_appending_copies_nothing_while_there_is_room() -> None:
    cache, new = growing_cache(CONFIG), torch.randn(1, 2, 1, 16)
    first = cache.update(torch.randn(1, 2, 30, 16), torch.randn(1, 2, 30, 16), 0)[0].data_ptr()
    assert {cache.update(new, new, 0)[0].data_ptr() for _ in range(100)} == {first}
    assert len({cache.update(new, new, 0)[0].data_ptr() for _ in range(2000)}) < 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_the_models_own_dtype_nothing_changes(dtype: torch.dtype) -> None:
    name = {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    new = torch.randn(1, 2, 70, 32, dtype=dtype)
    keys, values = growing_cache(CONFIG, kv_cache_type=name).update(new, -new, 0)
    assert torch.equal(keys, new) and torch.equal(values, -new)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_blocks_are_handed_out_in_the_models_dtype(dtype: torch.dtype) -> None:
    """Zeros stay zeros, and what float16 has no scale for stays finite."""
    states, new = QuantizedStates(), torch.randn(1, 2, 5, 64).to(dtype)
    new[..., 0, :], new[..., 1, 3] = 0, (1e9 if dtype != torch.float16 else 6e4)
    states.append(new)
    found = states.read(dtype)
    assert found.dtype == dtype and found.isfinite().all() and not found[..., 0, :].any()
    assert torch.allclose(found[..., 2:, :].float(), new[..., 2:, :].float(), atol=0.02)


@pytest.mark.parametrize(("kv_cache_type", "bytes_each"), [("auto", 4), ("f16", 2), ("bf16", 2), ("q8_0", 34 / 32)])
def test_bytes_are_those_of_the_type_and_up_to_the_plan_for_no_more(kv_cache_type: str, bytes_each: float) -> None:
    cache, new = growing_cache(CONFIG, kv_cache_type=kv_cache_type, most_tokens=1000), torch.randn(1, 2, 1, 32)
    cache.update(torch.randn(1, 2, 900, 32), torch.randn(1, 2, 900, 32), 0)
    for _ in range(100):
        cache.update(new, new, 0)
    assert layer_bytes(cache.layers[0]) == 1000 * 2 * 2 * 32 * bytes_each
    assert growing_cache(CONFIG, kv_cache_type=kv_cache_type).update(new, new, 0)[0].shape == new.shape
    cache.update(new, new, 0)  # whoever goes on all the same is served, in steps as before
    assert cache.get_seq_length() == 1001
    assert layer_bytes(cache.layers[0]) == 1257 * 2 * 2 * 32 * bytes_each


def test_a_conversation_begun_anew_takes_the_same_memory() -> None:
    cache = growing_cache(CONFIG, kv_cache_type="q8_0")
    cache.update(torch.randn(1, 2, 300, 32), torch.randn(1, 2, 300, 32), 0)
    before = layer_bytes(cache.layers[0])
    cache.layers[0].reset()
    assert cache.get_seq_length() == 0 and layer_bytes(cache.layers[0]) == before
    new = torch.zeros(1, 2, 3, 32)
    assert torch.equal(cache.update(new, new, 0)[0], new)


def test_layers_with_a_window_keep_all_and_layers_of_other_kinds_stay() -> None:
    config = Qwen3MoeConfig(num_hidden_layers=2, use_sliding_window=True, sliding_window=8)
    config.layer_types = ["full_attention", "sliding_attention"]
    ours = growing_cache(config)
    assert [type(layer) for layer in ours.layers] == [GrowingLayer, GrowingLayer]
    assert ours.refuses_fixed_steps() is None
    new = torch.randn(1, 2, 30, 32)
    for layer in range(2):
        ours.update(new, new, layer)
    assert ours.layers[1].get_seq_length() == 30 and torch.equal(ours.layers[1].keys, new)
    hybrid = Qwen3NextConfig(num_hidden_layers=4)
    stock, other = DynamicCache(config=hybrid), growing_cache(hybrid)
    assert type(other.layers[0]) is type(stock.layers[0]) is LinearAttentionLayer


def fixed(kv_cache_type: str, read_as_kept: set[int]) -> tuple[Any, list[tuple[torch.Tensor, torch.Tensor]]]:
    """A cache of 31 tokens, and what its two layers handed out in the fixed step of the last one."""
    cache, new = growing_cache(CONFIG, kv_cache_type=kv_cache_type), torch.randn(1, 2, 31, 32)
    for layer in range(2):
        cache.update(new[:, :, :30] * (layer + 1), -new[:, :, :30], layer)
    cache.fix(torch.tensor([30]), torch.tensor([31]), read_as_kept)
    handed_out = [cache.update(new[:, :, 30:] * (layer + 1), -new[:, :, 30:], layer) for layer in range(2)]
    cache.unfix(1)
    return cache, handed_out


def test_a_fixed_step_hands_out_rooms_as_they_are_kept_where_they_are_read_so() -> None:
    cache, ((keys, values), (converted, _)) = fixed("f16", {0})
    assert keys.dtype == values.dtype == torch.float16 and converted.dtype == torch.float32
    assert keys.data_ptr() == cache.layers[0].keys.data_ptr(), "nothing is copied"
    assert keys.shape[2] == converted.shape[2] == cache.room > 31
    assert torch.equal(converted[:, :, :31], cache.layers[1].keys.float())


def test_blocks_of_all_layers_become_floats_in_one_room() -> None:
    cache, ((keys, values), (others, _)) = fixed("q8_0", {0, 1})
    assert keys.data_ptr() == others.data_ptr() != values.data_ptr()
    assert others.shape[2] == cache.room > 31 and others.isfinite().all() and not others[:, :, 31:].any()
    new = torch.zeros(1, 2, 1, 32)
    assert torch.equal(cache.update(new, new, 1)[0][:, :, :31], others[:, :, :31])
