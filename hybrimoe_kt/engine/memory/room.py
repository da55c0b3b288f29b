"""Memory for the keys or values of one layer, made in steps ahead of need."""

from __future__ import annotations

import torch

__all__ = ["with_fixed_room", "with_room"]

_LEAST_ROOM = 256
_GROWTH = 1.25
"""Room made at a time: at least so many tokens, or this share of what is there. A choice."""
_LEAST_FIXED_ROOM = 1024
_FIXED_GROWTH = 2
"""Where moving means that steps are captured anew: so a conversation of 32,000 tokens moves five times. A choice."""


def with_room(room: torch.Tensor | None, length: int, new: torch.Tensor, most_tokens: int | None) -> torch.Tensor:
    """Return memory `[..., tokens, width]` with place for `new` behind the first `length` tokens of `room`.

    It is `room` itself while that has place, else a larger one with a copy of them. Up to `most_tokens`, for which
    memory was planned, it is not for more than these. Zeros stand behind them: a step that is given all of it
    multiplies what it does not look at by zero.
    """
    wanted = length + new.shape[-2]
    fits = room is not None and room.shape[-2] >= wanted and room.shape[:-2] == new.shape[:-2]
    if fits and room is not None and room.dtype == new.dtype and room.device == new.device:
        return room
    capacity = max(wanted + _LEAST_ROOM, int(wanted * _GROWTH))
    if most_tokens is not None and wanted <= most_tokens:
        capacity = min(capacity, most_tokens)
    larger = new.new_zeros(*new.shape[:-2], capacity, new.shape[-1])
    if length:
        assert room is not None, "it holds them"
        larger[..., :length, :] = room[..., :length, :]
    return larger


def with_fixed_room(room: torch.Tensor, length: int, wanted: int, most_tokens: int | None) -> torch.Tensor:
    """Return larger memory `[..., tokens, width]` for `wanted` tokens, with a copy of the first `length` of `room`.

    Zeros and `most_tokens` as of `with_room`.
    """
    capacity = max(_LEAST_FIXED_ROOM, _FIXED_GROWTH * wanted)
    if most_tokens is not None and wanted <= most_tokens:
        capacity = min(capacity, most_tokens)
    larger = room.new_zeros(*room.shape[:-2], capacity, room.shape[-1])
    larger[..., :length, :] = room[..., :length, :]
    return larger
