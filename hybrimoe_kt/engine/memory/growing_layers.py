"""One layer's keys and values, in memory that has room behind them: as floats, or in blocks of q8_0.

In a *fixed* step, see `GrowingCache`, a layer writes one token at a position that is read on the device, and hands out
all of its room. Kept in the model's dtype, that is the memory itself. Kept in another, it is so as well for attention
that reads it as it is kept, and converted for any other.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from .quantized_states import FloatRooms, QuantizedStates
from .room import with_fixed_room, with_room

__all__ = ["GrowingLayer", "QuantizedLayer", "RoomLayer"]


class RoomLayer(DynamicLayer):
    """What layers of either kind are to a cache. Ordinary steps go through `update` as those of Transformers' own."""

    length: int
    """Tokens held; fewer may be set, which forgets the others."""
    fixed_length: torch.Tensor | None = None
    """Tokens held with the one of a fixed step, int64 `[1]` on their device; None in any other step."""
    position: torch.Tensor | None = None
    """Where a fixed step writes, int64 `[1]`."""
    is_read_as_kept: bool = False
    """Whether attention reads the room in whatever dtype it is, in a fixed step."""
    holds_one_text: bool = True
    """Whether every token is seen by all after it, in any step: no rows are beside each other, and none is padded."""

    keeps_every_token = True
    """Whether something is held of each, so that the first ones' can be read alone."""

    @property
    def room(self) -> int:
        """Tokens that there is memory for."""
        raise NotImplementedError

    @property
    def num_moves(self) -> int:
        """How often what is held has moved, in fixed steps or others."""
        raise NotImplementedError

    def reserve(self, length: int) -> None:
        """Have room for `length` tokens; one was held before."""
        raise NotImplementedError

    def read_states(self, length: int) -> tuple[torch.Tensor, ...]:
        """What is held of the first `length` tokens, in its memory; nothing before the first token."""
        raise NotImplementedError

    def write_states(self, states: tuple[torch.Tensor, ...], length: int) -> None:
        """Hold a copy of what another layer of this kind has read, and nothing else."""
        raise NotImplementedError

    def get_seq_length(self) -> int:
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens."""
        self.length += max(-self.length, min(0, tokens_to_remove))

    def reset(self) -> None:
        """Forget all tokens; the memory stays for the next conversation."""
        self.length = 0


class GrowingLayer(RoomLayer):
    """Keys and values `[batch, heads, tokens, width]`."""

    num_moves = 0
    _moved, _column = -1, 0

    def __init__(self, dtype: torch.dtype | None, most_tokens: int | None) -> None:
        """Kept in `dtype`, None: the model's, in which they are handed out; `most_tokens` as of `with_room`."""
        self._rooms: list[torch.Tensor | None] = [None, None]
        self.length = 0
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept, self._most_tokens = dtype, most_tokens

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
        keys, values = self._append(given) if self.fixed_length is None else self._write(given)
        if self.fixed_length is not None and self.is_read_as_kept:
            return keys, values
        return keys.to(key_states.dtype), values.to(value_states.dtype)

    def _append(self, given: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what is held then."""
        end = self.length + given[0].shape[-2]
        for place, new in enumerate(given):
            kept = new.to(self._kept or new.dtype)
            room = with_room(self._rooms[place], self.length, kept, self._most_tokens)
            self.num_moves += room is not self._rooms[place]
            self._rooms[place] = room
            room[..., self.length : end, :] = kept
        self.length = end
        keys, values = self._held(0), self._held(1)
        assert keys is not None and values is not None, "made above"
        return keys, values

    def _write(self, given: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rooms."""
        keys, values = self._rooms
        assert keys is not None and values is not None and self.position is not None, "reserved and placed before"
        for room, new in zip((keys, values), given, strict=True):
            room.index_copy_(2, self.position, new.to(room.dtype))
        return keys, values

    def read_states(self, length: int) -> tuple[torch.Tensor, ...]:
        return tuple(room[..., :length, :] for room in self._rooms if room is not None)

    def write_states(self, states: tuple[torch.Tensor, ...], length: int) -> None:
        self.length = 0
        if states:
            if not self.is_initialized:
                self.lazy_initialization(*states)
            self._append((states[0], states[1]))

    @property
    def rooms(self) -> tuple[torch.Tensor | None, ...]:
        """The memory of keys and of values, `[batch, heads, room, width]`; None before the first token."""
        return tuple(self._rooms)

    def move_into(self, keys: torch.Tensor, values: torch.Tensor, *, column: int) -> None:
        """Have what is held in this memory from now on: a part of a longer one, in which it begins at `column`."""
        for place, room in enumerate((keys, values)):
            held = self._held(place)
            assert held is not None, "a token was held before"
            room[..., : self.length, :] = held
            self._rooms[place] = room
        self.num_moves += 1
        self._moved, self._column = self.num_moves, column

    def move_out(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Have what is held in memory of its own again: copies of it."""
        self._rooms = [keys, values]
        self.num_moves += 1

    @property
    def end_column(self) -> int | None:
        """Where the next token goes in the memory that `move_into` has put it into; None: it has moved since."""
        return self._column + self.length if self._moved == self.num_moves else None

    @property
    def room(self) -> int:
        return 0 if self._rooms[0] is None else self._rooms[0].shape[-2]

    def reserve(self, length: int) -> None:
        if all(room is not None and room.shape[-2] >= length for room in self._rooms):
            return
        for place, room in enumerate(self._rooms):
            assert room is not None, "a token was held before"
            self._rooms[place] = with_fixed_room(room, self.length, length, self._most_tokens)
        self.num_moves += 1


class QuantizedLayer(RoomLayer):
    """Keys and values in blocks of q8_0; all of one layer's are floats while its attention runs."""

    def __init__(self, most_tokens: int | None, floats: FloatRooms) -> None:
        """`floats` are what fixed steps of all layers read."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._held = QuantizedStates(most_tokens), QuantizedStates(most_tokens)
        self._floats = floats
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        given = zip(self._held, (key_states, value_states), strict=True)
        keys, values = (self._read(place, held, new) for place, (held, new) in enumerate(given))
        return keys, values

    def _read(self, place: int, held: QuantizedStates, new: torch.Tensor) -> torch.Tensor:
        """Take `new`; return what is held, or in a fixed step the room."""
        if self.fixed_length is None:
            held.append(new)
            return held.read(new.dtype)
        assert self.position is not None, "placed before"
        held.write(new, self.position)
        return held.read_room(self._floats.of(place, held.shape, new), self.fixed_length)

    def read_states(self, length: int) -> tuple[torch.Tensor, ...]:
        return tuple(part for held in self._held for part in held.blocks(length))

    def write_states(self, states: tuple[torch.Tensor, ...], length: int) -> None:
        self.length = 0
        if states:
            for held, blocks in zip(self._held, (states[:2], states[2:]), strict=True):
                held.append_blocks(blocks[0], blocks[1])

    @property
    def room(self) -> int:
        return self._held[0].room

    @property
    def num_moves(self) -> int:
        return sum(held.num_moves for held in self._held)

    def reserve(self, length: int) -> None:
        for held in self._held:
            held.reserve(length)

    @property
    def num_bytes(self) -> int:
        """Memory taken."""
        return sum(states.num_bytes for states in self._held)

    @property
    def length(self) -> int:
        return self._held[0].length

    @length.setter
    def length(self, tokens: int) -> None:
        for states in self._held:
            states.length = tokens
