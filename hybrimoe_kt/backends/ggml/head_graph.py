"""What follows the last layer, as a graph."""

from __future__ import annotations

from collections import OrderedDict

import torch

from .building import Builder, Region, Workspace
from .layer_pieces import linear, norm_of
from .parts import HeadParts
from .pool import FEW_TOKENS, Pool

__all__ = ["HeadGraph"]

_MOST_GRAPHS = 16
"""Kept beside that of one token, the latest used; of a few kilobytes, and the logits are memory of each."""


class HeadGraph:
    """Logits of one token, or of several at once."""

    def __init__(self, pool: Pool, parts: HeadParts, hidden: int) -> None:
        self._pool, self._parts, self._width = pool, parts, hidden
        self._one = _Graph(pool, parts, hidden)
        self._several: OrderedDict[int, _Graph] = OrderedDict()

    def compute(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits float32 `[vocab]` for the last layer's answer `[hidden]`; valid until the next call."""
        return self._one.compute(hidden)

    def compute_rows(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits float32 `[tokens, vocab]` for `[tokens, hidden]`; likewise."""
        tokens = len(hidden)
        found = self._several.get(tokens)
        if found is None:
            found = self._several[tokens] = _Graph(self._pool, self._parts, self._width, tokens)
            if len(self._several) > _MOST_GRAPHS:
                self._several.popitem(last=False)
        else:
            self._several.move_to_end(tokens)
        return found.compute(hidden)


class _Graph:
    def __init__(self, pool: Pool, parts: HeadParts, width: int, *tokens: int) -> None:
        builder = Builder(pool.library, Workspace())
        with torch.inference_mode(False):
            self._hidden = torch.empty(*tokens, width)
        given = builder.input(Region(self._hidden), width, *tokens)
        normed = norm_of(builder, given, parts.norm)
        out = builder.scaled(linear(builder, parts.head, normed), parts.logit_factor)
        self._graph = builder.graph(pool, out, is_short=sum(tokens) <= FEW_TOKENS)
        self._workspace, self._offset = builder.workspace, builder.offset_of(out)
        self._shape = *tokens, parts.head.rows

    def compute(self, hidden: torch.Tensor) -> torch.Tensor:
        self._hidden.copy_(hidden)
        self._graph.compute(0)
        return self._workspace.view(self._offset, *self._shape)
