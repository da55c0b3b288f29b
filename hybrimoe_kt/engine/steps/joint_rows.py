"""One step of several conversations through Transformers' own modules: a batch whose rows are padded on the left.

While they step together, what layers hold of them lies in rows of one memory, each ending at the same column, so that
nothing is copied from step to step: a conversation's own layer looks at its part of its row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DummyLayer, DynamicLayer, LinearAttentionLayer

from hybrimoe_kt.engine.memory.growing_cache import GrowingCache
from hybrimoe_kt.engine.memory.growing_layers import GrowingLayer
from hybrimoe_kt.host.hf.loading import LoadedModel

from .captured_rows import CapturedRows

__all__ = ["JointRows", "leave_rows"]

_NUMBERS = count(1)
_KINDS = GrowingLayer, LinearAttentionLayer, DummyLayer
"""Layers whose states can lie in rows."""
_LEAST_ROOM = 128
_GROWTH = 1.125
"""Columns made ahead: at least so many, or this share of what is there; then all rows are copied. A choice."""


class JointRows:
    """The memory of those conversations that step together, kept from step to step."""

    def __init__(self, most_tokens: Callable[[], int] | None = None) -> None:
        """Rows have no more room than for `most_tokens()` together, while they are not longer."""
        self._most_tokens = most_tokens
        self._caches: tuple[GrowingCache, ...] = ()
        self._moves: tuple[int, ...] = ()
        self.cache: Any = None
        """What the model is given."""
        self.column = self.room = 0
        """Where the next token of every row goes, and how many there is memory for."""
        self.starts: Sequence[int] = ()
        """The column that each row begins at."""
        self.number = 0
        """Of the memory: no other's."""

    @staticmethod
    def takes(loaded: LoadedModel, caches: Sequence[GrowingCache]) -> bool:
        """Whether every layer of this model holds what can lie in rows, and each has held a token."""
        if not all(JointRows.may_take(loaded, cache) for cache in caches):
            return False
        layers = (layer for cache in caches for layer in cache.layers if isinstance(layer, GrowingLayer))
        return all(layer.rooms[0] is not None for layer in layers)

    @staticmethod
    def may_take(loaded: LoadedModel, cache: GrowingCache) -> bool:
        """Whether it will, once each has."""
        if loaded.crossings is not None or loaded.architecture.layers_take_ids:
            return False
        return all(type(layer) in _KINDS for layer in cache.layers)

    def step(
        self,
        loaded: LoadedModel,
        tokens: torch.Tensor,
        caches: Sequence[GrowingCache],
        captured: CapturedRows | None = None,
    ) -> torch.Tensor:
        """Append `tokens [rows, 1]`, by replay where that is given; logits float32 `[rows, vocab]` on the CPU."""
        self._seat(loaded, caches)
        try:
            logits = captured.step(tokens, self) if captured is not None else self._ask(loaded, tokens)
        except BaseException:
            self.forget()
            raise
        self.column += 1
        for layer in self.cache.layers:
            if isinstance(layer, _RowsLayer):
                layer.column = self.column
        for cache in caches:
            for layer in cache.growing:
                layer.length += 1
        self._moves = tuple(cache.num_moves for cache in caches)
        return logits

    def _ask(self, loaded: LoadedModel, tokens: torch.Tensor) -> torch.Tensor:
        device = loaded.model.device
        starts = torch.tensor(self.starts, device=device)[:, None]
        mask = (torch.arange(self.column + 1, device=device) >= starts).long()
        given = {loaded.cache_name: self.cache}
        output = loaded.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=self.column - starts,
            use_cache=True,
            logits_to_keep=1,
            **given,
        )
        logits: torch.Tensor = output.logits[:, -1].float().cpu()
        return logits

    def fix(self, position: torch.Tensor | None) -> None:
        """Write at `position`, int64 `[1]` on the device, from now on, and hand out all columns; None: no more."""
        for layer in self.cache.layers:
            if isinstance(layer, _RowsLayer):
                layer.position = position

    def forget(self) -> None:
        """Let go of the memory; conversations keep theirs."""
        self._caches, self._moves, self.cache = (), (), None

    def _seat(self, loaded: LoadedModel, caches: Sequence[GrowingCache]) -> None:
        """Have each conversation in a row of its own, in this order."""
        now = tuple(caches)
        lengths = [cache.get_seq_length() for cache in caches]
        is_seated = self._caches == now and self._moves == tuple(cache.num_moves for cache in caches)
        if is_seated and self.column < self.room and all(self._ends_here(cache) for cache in caches):
            return
        self.column = max(lengths)
        self.room = max(self.column + _LEAST_ROOM, int(self.column * _GROWTH))
        if self._most_tokens is not None:
            self.room = max(self.column + 1, min(self.room, self._most_tokens() // len(caches)))
        self.starts = [self.column - length for length in lengths]
        self.number = next(_NUMBERS)
        joint = DynamicCache(config=loaded.model.config)
        for place in range(len(joint.layers)):
            joint.layers[place] = _joint([cache.layers[place] for cache in caches], self.column, self.room)
        for cache in caches:
            cache.note_moved_states()
        self.cache, self._caches = joint, now

    def holds(self, caches: Sequence[GrowingCache]) -> bool:
        """Whether these conversations, and no others, were in its rows in the step before."""
        return self._caches == tuple(caches)

    def _ends_here(self, cache: GrowingCache) -> bool:
        """Whether a row's next token is in the common column: it has not stepped alone meanwhile."""
        first = next((layer for layer in cache.layers if isinstance(layer, GrowingLayer)), None)  # all are as long
        return first is None or first.end_column == self.column


def _joint(layers: Sequence[Any], column: int, room: int) -> Any:
    if isinstance(layers[0], GrowingLayer):
        return _RowsLayer(layers, column, room)
    if isinstance(layers[0], DummyLayer):
        return layers[0]
    return _joint_states(layers)


class _RowsLayer(DynamicLayer):
    """Keys and values of several conversations."""

    holds_one_text = False
    """See `RoomLayer`."""

    def __init__(self, layers: Sequence[GrowingLayer], column: int, room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.column = column
        self.position: torch.Tensor | None = None
        """Where a fixed step writes, see `JointRows.fix`."""
        self.is_initialized = True
        rooms = []
        for place in range(2):
            (first, *_) = (layer.rooms[place] for layer in layers)
            assert first is not None, "a token was held before"
            rooms.append(first.new_zeros(len(layers), first.shape[1], room, first.shape[-1]))
        self._keys, self._values = rooms
        for row, layer in enumerate(layers):
            start = column - layer.length
            parts = (one[row : row + 1, :, start:] for one in rooms)
            layer.move_into(*parts, column=start)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take `[rows, heads, 1, width]` each."""
        if self.position is not None:
            for room, new in ((self._keys, key_states), (self._values, value_states)):
                room.index_copy_(2, self.position, new.to(room.dtype))
            return self._keys.to(key_states.dtype), self._values.to(value_states.dtype)
        end = self.column + 1
        self._keys[:, :, self.column : end] = key_states
        self._values[:, :, self.column : end] = value_states
        return self._keys[:, :, :end].to(key_states.dtype), self._values[:, :, :end].to(value_states.dtype)

    def get_seq_length(self) -> int:
        return self.column


def _joint_states(layers: Sequence[LinearAttentionLayer]) -> LinearAttentionLayer:
    """States of several conversations in one memory, of which each layer's own is a row from now on."""
    joint = LinearAttentionLayer(number_of_states=layers[0].number_of_states)
    for kind in ("conv_states", "recurrent_states"):
        states = getattr(joint, kind)
        for at, one in getattr(layers[0], kind).items():
            if one is None:
                continue
            states[at] = torch.cat([getattr(layer, kind)[at] for layer in layers])
            for row, layer in enumerate(layers):
                getattr(layer, kind)[at] = states[at][row : row + 1]
    first = layers[0]
    joint.is_conv_states_initialized = dict(first.is_conv_states_initialized)
    joint.is_recurrent_states_initialized = dict(first.is_recurrent_states_initialized)
    joint.has_previous_state = dict(first.has_previous_state)
    joint.conv_kernel_size = dict(first.conv_kernel_size)
    joint.device, joint.dtype = first.device, first.dtype
    return joint


@torch.inference_mode()
def leave_rows(cache: GrowingCache) -> None:
    """Have a conversation in memory of its own again, so that the others' can go."""
    for layer in cache.layers:
        if isinstance(layer, GrowingLayer) and layer.end_column is not None:
            keys, values = (room.clone() for room in layer.read_states(layer.length))
            layer.move_out(keys, values)
        elif type(layer) is LinearAttentionLayer:
            for states in (layer.conv_states, layer.recurrent_states):
                for at, one in states.items():
                    if one is not None and one.untyped_storage().nbytes() > one.nbytes:
                        states[at] = one.clone()
                        cache.note_moved_states()
