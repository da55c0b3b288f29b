"""Steps of few tokens through a model all of whose layers have dense pieces: no module of Transformers' in between.

A layer is its *dense piece* (hidden states in; residual stream, normalised states and the router's choice out) and the
experts. Who computes the piece is the layer's affair; the loop only goes from one to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from hybrimoe_kt.host.hf.dense_layers import DenseModel

__all__ = ["LayerLoop", "LoopedLayer"]


class LoopedLayer(Protocol):
    """What the loop asks of a layer; `GgmlLayer` is one. Steps are the layers' own kind of memory."""

    def begin(self, step: Any, position: int) -> torch.Tensor:
        """Say for all layers where a step begins; return where its hidden states are written, `[tokens, hidden]`."""

    def advance(self, held: Any, step: Any) -> None:
        """Put the layer's answer in the place of the hidden states, and hold what later tokens look at."""

    def advance_together(self, held: Sequence[Any]) -> None:
        """The same for a token of each of several conversations, which the model's memory has begun as rows."""


class LayerLoop:
    """Owns the loop over layers: each computes its dense piece, then its experts."""

    def __init__(self, dense: DenseModel) -> None:
        self._dense = dense

    def takes(self, tokens: int, length: int) -> bool:
        """Whether a step is for it: so many tokens, of a conversation of `length` with them."""
        most = self._dense.most_tokens
        return tokens <= most and (tokens == 1 or all(layer.takes(tokens, length) for layer in self._dense.layers))

    @torch.no_grad()
    def step(self, ids: Sequence[int], cache: Any) -> torch.Tensor:
        """Append `ids` to `cache`, one of `growing_cache`'s; the last one's logits, float32 `[vocab]`.

        Valid until the next step.
        """
        dense, tokens = self._dense, len(ids)
        layers: Sequence[LoopedLayer] = dense.layers
        step = dense.memory.step(tokens)
        hidden = layers[0].begin(step, cache.get_seq_length())
        embedded = dense.embedding(torch.tensor(ids))
        torch.mul(embedded, dense.embedding_factor, out=hidden)
        for layer, held in zip(layers, cache.layers, strict=True):
            layer.advance(held, step)
        return dense.head.compute(hidden[-1])

    def takes_together(self, num: int, longest: int) -> bool:
        """Whether it steps so many conversations at once, of which the longest has `longest` tokens with its next."""
        return 1 <= num <= self._dense.most_tokens and self.takes(1, longest)

    @torch.no_grad()
    def step_together(self, ids: Sequence[int], caches: Sequence[Any]) -> torch.Tensor:
        """Append `ids[i]` to `caches[i]`, different ones of `growing_cache`'s; logits float32 `[conversations, vocab]`.

        Valid until the next step. Conversations may be others, and in another order, each time.
        """
        assert len({id(cache) for cache in caches}) == len(ids) > 0, "a token for each of different conversations"
        if len(ids) == 1:
            return self.step(ids, caches[0])[None]
        dense, layers = self._dense, self._dense.layers
        hidden = dense.memory.rows.begin([cache.get_seq_length() for cache in caches])
        embedded = dense.embedding(torch.tensor(ids))
        torch.mul(embedded, dense.embedding_factor, out=hidden)
        for layer, *held in zip(layers, *(cache.layers for cache in caches), strict=True):
            layer.advance_together(held)
        return dense.head.compute_rows(hidden)
