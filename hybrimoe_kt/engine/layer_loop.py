"""Steps of few tokens through a model all of whose layers are graphs: no module of Transformers' in between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hybrimoe_kt.host.hf.dense_layers import DenseModel

__all__ = ["LayerLoop"]


class LayerLoop:
    """Owns the loop over layers: each computes its dense piece, then its experts."""

    def __init__(self, dense: DenseModel) -> None:
        self._dense = dense
        self.most_tokens = dense.most_tokens
        """Of one step."""

    def step(self, ids: Sequence[int], cache: Any) -> torch.Tensor:
        """Append `ids` to `cache`, one of `growing_cache`'s; the last one's logits, float32 `[vocab]`.

        Valid until the next step.
        """
        dense, tokens = self._dense, len(ids)
        step = dense.memory.step(tokens)
        hidden = dense.layers[0].begin(step, cache.get_seq_length())
        embedded = dense.embedding(torch.tensor(ids))
        torch.mul(embedded, dense.embedding_factor, out=hidden)
        for layer, held in zip(dense.layers, cache.layers, strict=True):
            layer.advance(held, step)
        return dense.head.compute(hidden[-1])
