"""The cache with room to grow answers as Transformers' own does, whatever is appended, cropped and begun anew."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, Qwen3MoeConfig

from hybrimoe_kt.engine.growing_cache import growing_cache

CONFIG = Qwen3MoeConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
OPERATIONS = st.lists(st.one_of(st.integers(1, 400), st.integers(-300, -1), st.just(0)), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(operations=OPERATIONS, seed=st.integers(0, 99))
def test_whatever_is_done_to_it_it_holds_what_the_stock_one_does(operations: list[int], seed: int) -> None:
    """A positive number appends so many tokens, a negative one crops as many, 0 begins anew."""
    generator = torch.Generator().manual_seed(seed)
    ours, stock = growing_cache(CONFIG), DynamicCache(config=CONFIG)
    for operation in operations:
        if operation == 0:
            ours, stock = growing_cache(CONFIG), DynamicCache(config=CONFIG)
        elif operation < 0:
            surplus = min(-operation, stock.get_seq_length())
            if surplus:
                ours.crop(-surplus), stock.crop(-surplus)
        else:
            for layer in range(2):
                new = [torch.randn(1, 2, operation, width, generator=generator) for width in (16, 8)]
                found, wanted = ours.update(*new, layer), stock.update(*new, layer)
                assert all(map(torch.equal, found, wanted))
        assert ours.get_seq_length() == stock.get_seq_length()


def test_appending_copies_nothing_while_there_is_room() -> None:
    cache, new = growing_cache(CONFIG), torch.randn(1, 2, 1, 16)
    first = cache.update(torch.randn(1, 2, 30, 16), torch.randn(1, 2, 30, 16), 0)[0].data_ptr()
    assert {cache.update(new, new, 0)[0].data_ptr() for _ in range(100)} == {first}
    assert len({cache.update(new, new, 0)[0].data_ptr() for _ in range(2000)}) < 10


def test_layers_of_other_kinds_stay() -> None:
    config = Qwen3MoeConfig(num_hidden_layers=2, use_sliding_window=True, sliding_window=8)
    config.layer_types = ["full_attention", "sliding_attention"]
    stock, ours = DynamicCache(config=config), growing_cache(config)
    if type(stock.layers[0]) is type(stock.layers[1]):
        pytest.skip("this version of Transformers has one kind of layer for both")
    assert type(ours.layers[1]) is type(stock.layers[1])
    assert type(ours.layers[0]) is not type(stock.layers[0])
