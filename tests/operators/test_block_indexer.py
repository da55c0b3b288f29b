"""`BlockIndexer` against the stock indexer, which goes through the tokens one by one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from hybrimoe_kt.errors import ConfigError
from hybrimoe_kt.operators.block_indexer import BlockIndexer

indexers = pytest.importorskip("transformers.models.qwen4_exp.modeling_qwen4_exp", reason="this Transformers lacks it")
configurations = pytest.importorskip("transformers.models.qwen4_exp.configuration_qwen4_exp")
HIDDEN, RATIO, BUDGET = 128, 8, 32


class Cache:
    """What an indexer asks of a cache."""

    def __init__(self) -> None:
        self.keys: torch.Tensor | None = None

    def update_indexer(self, keys: torch.Tensor, layer: int) -> torch.Tensor:
        self.keys = keys if self.keys is None else torch.cat((self.keys, keys), dim=1)
        return self.keys


def stock() -> Any:
    config = configurations.Qwen4ExpTextConfig(
        hidden_size=HIDDEN, head_dim=64, num_hidden_layers=4, num_attention_heads=4, indexer_n_heads=16,
        indexer_kv_heads=1, indexer_head_dim=64, indexer_budget=BUDGET, indexer_compress_ratio=RATIO,
    )  # fmt: skip
    torch.manual_seed(0)
    made = indexers.Qwen4ExpTextQSAIndexer(config, 3).eval()
    for parameter in made.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape)
    return made


def seen(indexer: Any, sizes: list[int], texts: int = 1) -> torch.Tensor:
    """What the last piece's tokens see of a text that comes in pieces of these sizes."""
    length, cache = sum(sizes), Cache()
    states = torch.randn(texts, length, HIDDEN, generator=torch.Generator().manual_seed(1))
    angles = torch.randn(texts, length, 8, generator=torch.Generator().manual_seed(2)).repeat(1, 1, 2)
    causal, at = torch.ones(length, length, dtype=torch.bool).tril(), 0
    for size in sizes:
        end = at + size
        mask = causal[at:end, :end].expand(texts, 1, size, end)
        rotation = angles[:, :end].cos(), angles[:, :end].sin()
        with torch.inference_mode():
            found = indexer(states[:, at:end], rotation, mask, cache) & mask
        at = end
    return found


@pytest.mark.parametrize("sizes", [[3], [39], [40], [100], [60, 41], [100, 1], [7, 1, 90, 13]])
def test_what_is_seen_is_what_the_stock_indexer_finds(sizes: list[int]) -> None:
    module = stock()
    wanted = seen(module, sizes)
    assert wanted.sum(-1).max() <= BUDGET + RATIO - 1
    found = seen(BlockIndexer("indexer", None, None, copy.deepcopy(module)), sizes)
    assert torch.equal(found, wanted)
    if sum(sizes) > BUDGET + RATIO:
        assert not wanted[0, 0, -1].all(), "something is left out"


def test_several_texts_are_left_to_the_stock_indexer() -> None:
    module = stock()
    assert torch.equal(seen(BlockIndexer("indexer", None, None, copy.deepcopy(module)), [50], 2), seen(module, [50], 2))


def test_another_module_is_refused() -> None:
    with pytest.raises(ConfigError, match="found Linear"):
        BlockIndexer("model.layers.3.self_attn.indexer", None, None, nn.Linear(2, 2))
