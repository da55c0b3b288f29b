"""A KV cache with room to grow: Transformers' own copies all of it for every new token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

__all__ = ["growing_cache", "layer_bytes"]

_LEAST_ROOM = 256
_GROWTH = 1.25
"""Room made at a time: at least so many tokens, or this share of what is there. A choice."""


class _GrowingLayer(DynamicLayer):
    """Keys and values `[batch, heads, tokens, width]`, as views of memory that has room behind them."""

    _keys_room: torch.Tensor | None = None
    _values_room: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None, "made above"
        self._keys_room, self.keys = _appended(self._keys_room, self.keys, key_states)
        self._values_room, self.values = _appended(self._values_room, self.values, value_states)
        return self.keys, self.values


def _appended(room: torch.Tensor | None, held: torch.Tensor, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Write `new` behind `held`, which is the beginning of `room` or is moved to a larger one."""
    length = held.shape[-2] if held.numel() else 0
    wanted = length + new.shape[-2]
    fits = room is not None and room.shape[-2] >= wanted and room.dtype == new.dtype and room.device == new.device
    if not fits or (length and held.data_ptr() != room.data_ptr()):  # type: ignore[union-attr]
        capacity = max(wanted + _LEAST_ROOM, int(wanted * _GROWTH))
        room = new.new_empty(*new.shape[:-2], capacity, new.shape[-1])
        if length:
            room[..., :length, :] = held
    assert room is not None
    room[..., length:wanted, :] = new
    return room, room[..., :wanted, :]


def growing_cache(config: Any, own: Sequence[Any] = ()) -> DynamicCache:
    """Make a cache for a model; layers of other kinds, with windows or linear attention, stay Transformers' own.

    `own` has for each layer what keeps its keys and values instead, or None.
    """
    cache = DynamicCache(config=config)
    for place, layer in enumerate(cache.layers):
        if place < len(own) and own[place] is not None:
            cache.layers[place] = own[place]
        elif type(layer) is DynamicLayer:
            cache.layers[place] = _GrowingLayer()  # type: ignore[no-untyped-call]
    return cache


def layer_bytes(layer: Any) -> int:
    """Memory that a cache's layer takes for keys and values, or for the states of linear attention."""
    own: int | None = getattr(layer, "num_bytes", None)
    if own is not None:
        return own
    states = (*getattr(layer, "conv_states", {}).values(), *getattr(layer, "recurrent_states", {}).values())
    held = (getattr(layer, "keys", None), getattr(layer, "values", None), *states)
    return sum(tensor.untyped_storage().nbytes() for tensor in held if isinstance(tensor, torch.Tensor))
