"""Keys or values of one layer in blocks of q8_0: 32 numbers of a head as int8, with a float16 scale."""

from __future__ import annotations

import torch

from hybrimoe_kt.kv_cache_types import BLOCK_VALUES

from .room import with_room

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
        self._numbers: torch.Tensor | None = None
        self._scales: torch.Tensor | None = None

    def append(self, states: torch.Tensor) -> None:
        """Take `[batch, heads, tokens, width]`, floats."""
        blocks = states.float().unflatten(-1, (-1, BLOCK_VALUES))
        scales = (blocks.abs().amax(-1) / _LARGEST).clamp_(max=_LARGEST_SCALE).half()
        divisors = torch.where(scales == 0, 1.0, scales.float())[..., None]  # by what is kept, not by what it rounds
        numbers = (blocks / divisors).round_().clamp_(-_LARGEST, _LARGEST).to(torch.int8).flatten(-2)
        self._numbers = with_room(self._numbers, self.length, numbers, self._most_tokens)
        self._scales = with_room(self._scales, self.length, scales, self._most_tokens)
        end = self.length + states.shape[-2]
        self._numbers[..., self.length : end, :] = numbers
        self._scales[..., self.length : end, :] = scales
        self.length = end

    def read(self, dtype: torch.dtype) -> torch.Tensor:
        """All that is held, `[batch, heads, tokens, width]`, in memory of its own."""
        assert self._numbers is not None and self._scales is not None, "nothing was appended"
        numbers = self._numbers[..., : self.length, :].unflatten(-1, (-1, BLOCK_VALUES))
        scales = self._scales[..., : self.length, :, None].float()
        out = torch.empty(numbers.shape, dtype=dtype, device=numbers.device)
        return torch.mul(numbers, scales, out=out).flatten(-2)

    @property
    def num_bytes(self) -> int:
        """Memory taken."""
        return sum(part.nbytes for part in (self._numbers, self._scales) if part is not None)
