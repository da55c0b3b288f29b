"""`BlockIndexer`: Qwen3.8's choice of blocks for all queries of a step at once; the stock one asks token by token."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hybrimoe_kt.errors import ConfigError

from .adopted import Adopted

__all__ = ["BlockIndexer"]

_HAS = ("index_qk_proj", "q_layernorm", "k_layernorm", "block_topk", "compress_ratio")


class BlockIndexer(Adopted):
    """In place of an indexer that scores means of `compress_ratio` keys and keeps the best `block_topk` of them.

    Whole blocks behind a query compete, what follows the last of them is always seen. It takes one text that nothing
    is left out of; anything else is the stock module's.
    """

    index_qk_proj: Any
    q_layernorm: Any
    k_layernorm: Any
    index_head_dim: int
    index_n_heads: int
    compress_ratio: int
    block_topk: int
    layer_idx: int

    def __init__(
        self,
        key: str,
        gguf_loader: Any,
        config: Any,
        orig_module: nn.Module,
        prefill_device: str | None = None,
        generate_device: str | None = None,
    ) -> None:
        if not all(hasattr(orig_module, name) for name in _HAS):
            raise ConfigError(f"{key}: BlockIndexer replaces an indexer of blocks, found {type(orig_module).__name__}")
        super().__init__(orig_module)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor,
        cache: Any,
    ) -> torch.Tensor:
        """`hidden_states [1, tokens, hidden]` -> what each query may see, bool `[1, 1, tokens, length]`.

        `position_embeddings` are of all `length` tokens, `[1, length, rotated]` each.
        """
        tokens, length = hidden_states.shape[1], position_embeddings[0].shape[1]
        if hidden_states.shape[0] != 1 or attention_mask.shape[-2:] != (tokens, length):
            stock: torch.Tensor = super().forward(hidden_states, position_embeddings, attention_mask, cache)
            return stock
        width, heads = self.index_head_dim, self.index_n_heads
        queries, keys = self.index_qk_proj(hidden_states)[0].split((heads * width, width), dim=-1)
        queries = _turned(self.q_layernorm(queries.view(tokens, heads, width)), position_embeddings, length - tokens, 1)
        if cache is not None:
            keys = cache.update_indexer(keys[None], self.layer_idx)[0]
        ratio, most = self.compress_ratio, self.block_topk
        ends = torch.arange(length - tokens + 1, length + 1, device=keys.device)[:, None]  # what each query sees
        whole, places = ends // ratio, torch.arange(length, device=keys.device)
        blocks = length // ratio
        if blocks <= most:
            return (places < ends)[None, None]
        means = keys[: blocks * ratio].view(blocks, ratio, width).float().mean(dim=1).to(keys.dtype)
        means = _turned(self.k_layernorm(means)[:, None], position_embeddings, 0, ratio)[:blocks, 0]
        scores = torch.zeros(tokens, blocks, device=keys.device)
        for head in range(heads):  # one at a time: all heads' scores of a long text would fill a card
            scores += torch.relu(queries[:, head].float() @ means.float().T)
        scores = scores.masked_fill_(torch.arange(blocks, device=keys.device) >= whole, -torch.inf)
        best = scores.topk(most, dim=-1)
        found = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best.indices, best.values > -torch.inf)
        seen = (places < ends) & (places >= whole * ratio)
        seen[:, : blocks * ratio] |= found.repeat_interleave(ratio, dim=1)
        return seen[None, None]


def _turned(states: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor], start: int, step: int) -> torch.Tensor:
    """`[tokens, heads, width]` with the first dimensions rotated; the positions are every `step` from `start`."""
    cosines, sines = (part[0, start::step][: len(states), None] for part in rotation)
    rotated, rest = states[..., : cosines.shape[-1]], states[..., cosines.shape[-1] :]
    first, second = rotated.chunk(2, dim=-1)
    return torch.cat((rotated * cosines + torch.cat((-second, first), dim=-1) * sines, rest), dim=-1)
