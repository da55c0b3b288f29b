"""A KV cache with room to grow: Transformers' own copies all of it for every new token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from hybrimoe_kt.kv_cache_types import KV_CACHE_TYPES

from .quantized_states import QuantizedStates
from .room import with_fixed_room, with_room

__all__ = ["GrowingCache", "growing_cache", "layer_bytes"]


class _GrowingLayer(DynamicLayer):
    """Keys and values `[batch, heads, tokens, width]`, in memory that has room behind them.

    In a fixed step that memory, all of it, is what attention is given; see `GrowingCache`.
    """

    fixed_length: torch.Tensor | None = None
    """Tokens held with the one of a fixed step, int64 `[1]` on their device; None in any other step."""

    def __init__(self, dtype: torch.dtype | None, most_tokens: int | None) -> None:
        """Kept in `dtype`, None: the model's, in which they are handed out; `most_tokens` as of `with_room`."""
        self._rooms: list[torch.Tensor | None] = [None, None]
        self.length = 0
        """Tokens held; fewer may be set, which forgets the others."""
        self.num_moves = 0
        """How often what is held has moved, in fixed steps or others."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept, self._most_tokens = dtype, most_tokens
        self.position: torch.Tensor | None = None
        """Where a fixed step writes, int64 `[1]`."""

    @property
    def keys(self) -> torch.Tensor | None:
        return self._held(0)

    @keys.setter
    def keys(self, states: torch.Tensor | None) -> None:
        self._replace(0, states)

    @property
    def values(self) -> torch.Tensor | None:
        return self._held(1)

    @values.setter
    def values(self, states: torch.Tensor | None) -> None:
        self._replace(1, states)

    def _held(self, place: int) -> torch.Tensor | None:
        room = self._rooms[place]
        return None if room is None else room[..., : self.length, :]

    def _replace(self, place: int, states: torch.Tensor | None) -> None:
        """What Transformers does to a cache in one piece: beams, offloading."""
        held = states is not None and states.numel() > 0
        self._rooms[place] = states if held else None
        self.num_moves += 1
        self.length = states.shape[-2] if held and states is not None else 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        given = key_states, value_states
        if self.fixed_length is not None:
            for room, new in zip(self._rooms, given, strict=True):
                assert room is not None and self.position is not None, "reserved and placed before"
                room.index_copy_(2, self.position, new.to(room.dtype))
        else:
            end = self.length + key_states.shape[-2]
            for place, new in enumerate(given):
                kept = new.to(self._kept or new.dtype)
                room = with_room(self._rooms[place], self.length, kept, self._most_tokens)
                self.num_moves += room is not self._rooms[place]
                self._rooms[place] = room
                room[..., self.length : end, :] = kept
            self.length = end
        keys, values = self._rooms if self.fixed_length is not None else (self._held(0), self._held(1))
        assert keys is not None and values is not None, "made above"
        return keys.to(key_states.dtype), values.to(value_states.dtype)

    @property
    def room(self) -> int:
        """Tokens that there is memory for."""
        return 0 if self._rooms[0] is None else self._rooms[0].shape[-2]

    def reserve(self, length: int) -> None:
        """Have room for `length` tokens."""
        if all(room is not None and room.shape[-2] >= length for room in self._rooms):
            return
        for place, room in enumerate(self._rooms):
            assert room is not None, "a token was held before"
            self._rooms[place] = with_fixed_room(room, self.length, length, self._most_tokens)
        self.num_moves += 1

    def get_seq_length(self) -> int:
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens."""
        self.length += max(-self.length, min(0, tokens_to_remove))

    def reset(self) -> None:
        """Forget all tokens; the memory stays for the next conversation."""
        self.length = 0


class _QuantizedLayer(DynamicLayer):
    """Keys and values in blocks of q8_0; all of one layer's are floats while its attention runs."""

    fixed_length: torch.Tensor | None = None
    """See `_GrowingLayer`."""

    def __init__(self, most_tokens: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._held = QuantizedStates(most_tokens), QuantizedStates(most_tokens)
        self.is_initialized = True
        self.position: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        is_fixed = self.fixed_length is not None
        for held, new in zip(self._held, (key_states, value_states), strict=True):
            if is_fixed:
                assert self.position is not None, "placed before"
                held.write(new, self.position)
            else:
                held.append(new)
        keys, values = self._held
        return keys.read(key_states.dtype, all_room=is_fixed), values.read(value_states.dtype, all_room=is_fixed)

    @property
    def room(self) -> int:
        """See `_GrowingLayer`."""
        return self._held[0].room

    @property
    def num_moves(self) -> int:
        """See `_GrowingLayer`."""
        return sum(held.num_moves for held in self._held)

    def reserve(self, length: int) -> None:
        """See `_GrowingLayer`."""
        for held in self._held:
            held.reserve(length)

    @property
    def num_bytes(self) -> int:
        """Memory taken."""
        return sum(states.num_bytes for states in self._held)

    @property
    def length(self) -> int:
        """See `_GrowingLayer`."""
        return self._held[0].length

    @length.setter
    def length(self, tokens: int) -> None:
        for states in self._held:
            states.length = tokens

    def get_seq_length(self) -> int:
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens."""
        self.length += max(-self.length, min(0, tokens_to_remove))

    def reset(self) -> None:
        """Forget all tokens; the memory stays for the next conversation."""
        self.length = 0


class GrowingCache(DynamicCache):
    """A conversation's. Its layers of other kinds, with windows or linear attention, are Transformers' own.

    In a *fixed* step, one of a single token, everything stays where it is: keys and values are written at a position
    that is read on the device, and attention is given all the room there is and the length, on the device as well.
    """

    @property
    def num_moves(self) -> int:
        """How often what layers hold has moved, which is when what was captured of a step is worth nothing.

        A prompt moves it as well, where it needs room.
        """
        return sum(layer.num_moves for layer in self.growing)

    @property
    def growing(self) -> list[_GrowingLayer | _QuantizedLayer]:
        """The layers that grow."""
        return [layer for layer in self.layers if isinstance(layer, (_GrowingLayer, _QuantizedLayer))]

    @property
    def room(self) -> int:
        """Tokens that there is room for in every layer that grows."""
        return min((layer.room for layer in self.growing), default=0)

    def refuses_fixed_steps(self) -> str | None:
        """Return why no step can be fixed, None when some can."""
        for number, layer in enumerate(self.layers):
            if not isinstance(layer, (_GrowingLayer, _QuantizedLayer)) and type(layer) is not LinearAttentionLayer:
                kind = type(layer).__name__
                return f"layer {number} keeps keys and values in a {kind}, which captured steps do not read"
        return None

    @torch.inference_mode()  # in which states of linear attention were made, and so may be cleared
    def forget(self) -> None:
        """Forget all tokens; the memory stays for the next conversation."""
        self.reset()  # type: ignore[no-untyped-call]

    def fix(self, position: torch.Tensor, length: torch.Tensor) -> None:
        """Let the next step be fixed, which writes at `position` and looks at `length` tokens: int64 `[1]` each.

        Has room for it first; the layers have held a token before.
        """
        for layer in self.growing:
            layer.reserve(layer.length + 1)
            layer.position, layer.fixed_length = position, length

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
    cache, dtype = GrowingCache(config=config), KV_CACHE_TYPES[kv_cache_type].dtype
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
