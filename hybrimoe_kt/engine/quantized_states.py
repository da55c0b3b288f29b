"""Keys or values of one layer in blocks of q8_0: 32 numbers of a head as int8, with a float16 scale."""

from __future__ import annotations

import torch

from hybrimoe_kt.kv_cache_types import BLOCK_VALUES

from .room import with_fixed_room, with_room

__all__ = ["QuantizedStates"]

_LARGEST = 127
_LARGEST_SCALE = 65504.0
"""float16's largest number."""


class QuantizedStates:
    """`[batch, heads, tokens, width]` as int8 of that shape and float16 scales `[..., tokens, width / 32]`."""

    def __init__(self, most_tokens: int | None = None) -> None:
        """`most_tokens` as of `with_room`."""
        self.length = 0
        """Tokens held; fewer may be set, which forgets the others."""
        self._most_tokens = most_tokens
        self.num_moves = 0
        """How often what is held has moved."""
        self._numbers: torch.Tensor | None = None
        self._scales: torch.Tensor | None = None

    def append(self, states: torch.Tensor) -> None:
        """Take `[batch, heads, tokens, width]`, floats."""
        numbers, scales = _blocks_of(states)
        before = self._numbers
        self._numbers = with_room(before, self.length, numbers, self._most_tokens)
        self.num_moves += self._numbers is not before
        self._scales = with_room(self._scales, self.length, scales, self._most_tokens)
        end = self.length + states.shape[-2]
        self._numbers[..., self.length : end, :] = numbers
        self._scales[..., self.length : end, :] = scales
        self.length = end

    def write(self, states: torch.Tensor, position: torch.Tensor) -> None:
        """Put one token at `position`, int64 `[1]` on the device, where there is room for it."""
        assert self._numbers is not None and self._scales is not None, "nothing was appended"
        numbers, scales = _blocks_of(states)
        self._numbers.index_copy_(2, position, numbers)
        self._scales.index_copy_(2, position, scales)

    def reserve(self, length: int) -> None:
        """Have room for `length` tokens."""
        assert self._numbers is not None and self._scales is not None, "nothing was appended"
        if self._numbers.shape[-2] >= length:
            return
        self._numbers = with_fixed_room(self._numbers, self.length, length, self._most_tokens)
        self._scales = with_fixed_room(self._scales, self.length, length, self._most_tokens)
        self.num_moves += 1

    def read(self, dtype: torch.dtype, *, all_room: bool = False) -> torch.Tensor:
        """All that is held, `[batch, heads, tokens, width]`, in memory of its own; or all there is room for."""
        assert self._numbers is not None and self._scales is not None, "nothing was appended"
        end = self._numbers.shape[-2] if all_room else self.length
        numbers = self._numbers[..., :end, :].unflatten(-1, (-1, BLOCK_VALUES))
        scales = self._scales[..., :end, :, None].float()
        out = torch.empty(numbers.shape, dtype=dtype, device=numbers.device)
        return torch.mul(numbers, scales, out=out).flatten(-2)

    @property
    def room(self) -> int:
        """Tokens that there is memory for."""
        return 0 if self._numbers is None else self._numbers.shape[-2]

    @property
    def num_bytes(self) -> int:
        """Memory taken."""
        return sum(part.nbytes for part in (self._numbers, self._scales) if part is not None)


def _blocks_of(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers int8 `[..., width]` and their scales float16 `[..., width / 32]`."""
    blocks = states.float().unflatten(-1, (-1, BLOCK_VALUES))
    scales = (blocks.abs().amax(-1) / _LARGEST).clamp_(max=_LARGEST_SCALE).half()
    divisors = torch.where(scales == 0, 1.0, scales.float())[..., None]  # by what is kept, not by what it rounds
    return (blocks / divisors).round_().clamp_(-_LARGEST, _LARGEST).to(torch.int8).flatten(-2), scales
