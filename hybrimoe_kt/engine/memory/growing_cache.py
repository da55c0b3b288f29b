"""A KV cache with room to grow: Transformers' own copies all of it for every new token."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import count
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from hybrimoe_kt.kv_cache_types import KV_CACHE_TYPES

from .growing_layers import GrowingLayer, QuantizedLayer, RoomLayer
from .quantized_states import FloatRooms

__all__ = ["GrowingCache", "growing_cache", "layer_bytes"]


_WHOLE = DynamicLayer, DynamicSlidingWindowLayer
"""Layers of which all tokens are kept: those with a window too, so that a conversation can go back.

Not so beside layers that compress what has left the window: one mask is of both.
"""


_NUMBERS = count()
_HELD = "keys", "values", "indexer_keys", "idx_keys"
_COMPRESSED = "compressed_kv", "buffer_kv", "buffer_gate", "overlap_kv", "overlap_gate"
"""Where DeepSeek-V4's layers keep tokens that have left the window, and those that will be compressed next."""


class GrowingCache(DynamicCache):
    """A conversation's. Its layers of other kinds, such as linear attention's, are Transformers' own.

    In a *fixed* step, one of a single token, everything stays where it is: keys and values are written at a position
    that is read on the device, and attention is given all the room there is and the length, on the device as well.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.number = next(_NUMBERS)
        """No other cache's, also once this one is gone."""
        self._num_state_moves = 0

    @property
    def num_moves(self) -> int:
        """How often what layers hold has moved, which is when what was captured of a step is worth nothing.

        A prompt moves it as well, where it needs room.
        """
        return self._num_state_moves + sum(layer.num_moves for layer in self.growing)

    def note_moved_states(self) -> None:
        """States of linear attention are in other memory now, which layers of that kind do not count."""
        self._num_state_moves += 1

    @property
    def is_croppable(self) -> bool:
        """Whether it can go back: not where what has left a window is gone."""
        own: bool = super().is_croppable
        return own and not any(isinstance(layer, DynamicSlidingWindowLayer) for layer in self.layers)

    @property
    def growing(self) -> list[RoomLayer]:
        """The layers that grow."""
        return [layer for layer in self.layers if isinstance(layer, RoomLayer)]

    @property
    def room(self) -> int:
        """Tokens that there is room for in every layer that grows."""
        return min((layer.room for layer in self.growing), default=0)

    @property
    def usual_room(self) -> int:
        """Tokens that there is room for in the first layer that grows: nearly all have as much."""
        return next((layer.room for layer in self.layers if isinstance(layer, RoomLayer)), 0)

    def refuses_fixed_steps(self) -> str | None:
        """Return why no step can be fixed, None when some can."""
        for number, layer in enumerate(self.layers):
            if not isinstance(layer, RoomLayer) and type(layer) is not LinearAttentionLayer:
                kind = type(layer).__name__
                return f"layer {number} keeps keys and values in a {kind}, which captured steps do not read"
        return None

    @torch.inference_mode()  # in which states of linear attention were made, and so may be cleared
    def forget(self) -> None:
        """Forget all tokens; the memory stays for the next conversation."""
        self.reset()  # type: ignore[no-untyped-call]

    def fix(self, position: torch.Tensor, length: torch.Tensor, read_as_kept: Collection[int] = ()) -> None:
        """Let the next step be fixed, which writes at `position` and looks at `length` tokens: int64 `[1]` each.

        Has room for it first; the layers have held a token before. Attention of the layers `read_as_kept` takes keys
        and values in any dtype.
        """
        for number, layer in enumerate(self.layers):
            if isinstance(layer, RoomLayer):
                layer.reserve(layer.length + 1)
                layer.position, layer.fixed_length = position, length
                layer.is_read_as_kept = number in read_as_kept

    def unfix(self, num_tokens: int) -> None:
        """End a fixed step, which has added so many tokens: one, or none where it failed."""
        for layer in self.growing:
            layer.fixed_length = None
            layer.length += num_tokens


def growing_cache(
    config: Any, own: Sequence[Any] = (), *, kv_cache_type: str = "auto", most_tokens: int | None = None
) -> GrowingCache:
    """Make a cache for a model.

    `own` has for each layer what keeps its keys and values instead, or None. `most_tokens` as of `with_room`.
    """
    cache, dtype, floats = GrowingCache(config=config), KV_CACHE_TYPES[kv_cache_type].dtype, FloatRooms()
    compresses = any(hasattr(layer, "compressed_kv") for layer in cache.layers)
    whole = () if compresses else _WHOLE
    for place, layer in enumerate(cache.layers):
        if place < len(own) and own[place] is not None:
            cache.layers[place] = own[place]
        elif type(layer) in whole and kv_cache_type == "q8_0":
            cache.layers[place] = QuantizedLayer(most_tokens, floats)
        elif type(layer) in whole:
            cache.layers[place] = GrowingLayer(getattr(torch, dtype) if dtype else None, most_tokens)
    return cache


def layer_bytes(layer: Any) -> int:
    """Memory that a cache's layer takes for keys and values, or for the states of linear attention."""
    own: int | None = getattr(layer, "num_bytes", None)
    if own is not None:
        return own
    states = (*getattr(layer, "conv_states", {}).values(), *getattr(layer, "recurrent_states", {}).values())
    compressed = (state for name in _COMPRESSED for state in getattr(layer, name, {}).values())
    held = (*(getattr(layer, name, None) for name in _HELD), *states, *compressed)
    places = {each.data_ptr(): each.untyped_storage().nbytes() for each in held if isinstance(each, torch.Tensor)}
    return sum(places.values())
