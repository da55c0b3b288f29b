"""A cache's layer in a step of a fixed length, as DecodeAttention and AbsorbedMLA are promised it; for tests."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

__all__ = ["FixedLayer", "fix_lengths"]


class FixedLayer(DynamicLayer):
    """Rooms of `capacity` tokens that hold what a layer held; what lies behind is NaN.

    `fixed_length` is set by whoever steps, one for all layers.
    """

    def __init__(self, held: DynamicLayer, capacity: int, length: torch.Tensor, dtype: torch.dtype | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        assert held.keys is not None and held.values is not None
        self._rooms = [_room(part, capacity, dtype) for part in (held.keys, held.values)]
        self.fixed_length = length
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        place = self.fixed_length - 1
        for room, new in zip(self._rooms, (key_states, value_states), strict=True):
            room.index_copy_(2, place, new.to(room.dtype))
        return self._rooms[0], self._rooms[1]

    def get_seq_length(self) -> int:
        raise AssertionError("a fixed step asks nobody on the host how many tokens are held")


def _room(held: torch.Tensor, capacity: int, dtype: torch.dtype | None) -> torch.Tensor:
    shape = *held.shape[:2], capacity, held.shape[-1]
    room = torch.full(shape, float("nan"), dtype=dtype or held.dtype, device=held.device)
    room[:, :, : held.shape[2]] = held
    return room


def fix_lengths(cache: Any, capacity: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Put a fixed layer in place of each that keeps keys and values, and return the length that they share."""
    length = torch.zeros(1, dtype=torch.int64)
    for place, layer in enumerate(cache.layers):
        if isinstance(layer, DynamicLayer) and layer.is_initialized:
            cache.layers[place] = FixedLayer(layer, capacity, length, dtype)
    return length
