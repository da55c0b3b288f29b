"""A KV cache with room to grow: Transformers' own copies all of it for every new token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from hybrimoe_kt.kv_cache_types import KV_CACHE_TYPES

from .quantized_states import QuantizedStates
from .room import with_room

__all__ = ["growing_cache", "layer_bytes"]


class _GrowingLayer(DynamicLayer):
    """Keys and values `[batch, heads, tokens, width]`, as views of memory that has room behind them."""

    _keys_room: torch.Tensor | None = None
    _values_room: torch.Tensor | None = None

    def __init__(self, dtype: torch.dtype | None, most_tokens: int | None) -> None:
        """Kept in `dtype`, None: the model's, in which they are handed out; `most_tokens` as of `with_room`."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept, self._most_tokens = dtype, most_tokens

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None, "made above"
        self._keys_room, self.keys = self._appended(self._keys_room, self.keys, key_states)
        self._values_room, self.values = self._appended(self._values_room, self.values, value_states)
        return self.keys.to(key_states.dtype), self.values.to(value_states.dtype)

    def _appended(
        self, room: torch.Tensor | None, held: torch.Tensor, new: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write `new` behind `held`, which is the beginning of `room` or is moved to a larger one."""
        new = new.to(self._kept or new.dtype)
        length = held.shape[-2] if held.numel() else 0
        is_own = room is not None and held.data_ptr() == room.data_ptr()
        if not is_own and length:
            room = held
        room = with_room(room, length, new, self._most_tokens)
        room[..., length : length + new.shape[-2], :] = new
        return room, room[..., : length + new.shape[-2], :]


class _QuantizedLayer(DynamicLayer):
    """Keys and values in blocks of q8_0; all of one layer's are floats while its attention runs."""

    def __init__(self, most_tokens: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._held = QuantizedStates(most_tokens), QuantizedStates(most_tokens)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self._held
        keys.append(key_states)
        values.append(value_states)
        return keys.read(key_states.dtype), values.read(value_states.dtype)

    @property
    def num_bytes(self) -> int:
        """Memory taken."""
        return sum(states.num_bytes for states in self._held)

    def get_seq_length(self) -> int:
        return self._held[0].length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens."""
        for states in self._held:
            states.length += max(-states.length, min(0, tokens_to_remove))

    def reset(self) -> None:
        """Forget all tokens; the memory stays for the next conversation."""
        self.crop(-self.get_seq_length())


def growing_cache(
    config: Any, own: Sequence[Any] = (), *, kv_cache_type: str = "auto", most_tokens: int | None = None
) -> DynamicCache:
    """Make a cache for a model; layers of other kinds, with windows or linear attention, stay Transformers' own.

    `own` has for each layer what keeps its keys and values instead, or None. `most_tokens` as of `with_room`.
    """
    cache, dtype = DynamicCache(config=config), KV_CACHE_TYPES[kv_cache_type].dtype
    for place, layer in enumerate(cache.layers):
        if place < len(own) and own[place] is not None:
            cache.layers[place] = own[place]
        elif type(layer) is DynamicLayer and kv_cache_type == "q8_0":
            cache.layers[place] = _QuantizedLayer(most_tokens)
        elif type(layer) is DynamicLayer:
            cache.layers[place] = _GrowingLayer(getattr(torch, dtype) if dtype else None, most_tokens)
    return cache


def layer_bytes(layer: Any) -> int:
    """Memory that a cache's layer takes for keys and values, or for the states of linear attention."""
    own: int | None = getattr(layer, "num_bytes", None)
    if own is not None:
        return own
    states = (*getattr(layer, "conv_states", {}).values(), *getattr(layer, "recurrent_states", {}).values())
    held = (getattr(layer, "keys", None), getattr(layer, "values", None), *states)
    return sum(tensor.untyped_storage().nbytes() for tensor in held if isinstance(tensor, torch.Tensor))
