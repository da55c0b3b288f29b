"""Keys or values of one layer in blocks of q8_0: 32 numbers of a head as int8, with a float16 scale."""

from __future__ import annotations

import torch

from hybrimoe_kt.device import step_graph
from hybrimoe_kt.kv_cache_types import BLOCK_VALUES

from .room import with_fixed_room, with_room

__all__ = ["FloatRooms", "QuantizedStates"]

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
        self.append_blocks(*_blocks_of(states))

    def append_blocks(self, numbers: torch.Tensor, scales: torch.Tensor) -> None:
        """Take blocks as they are kept: numbers int8 `[..., tokens, width]`, scales `[..., tokens, width / 32]`."""
        before = self._numbers
        self._numbers = with_room(before, self.length, numbers, self._most_tokens)
        self.num_moves += self._numbers is not before
        self._scales = with_room(self._scales, self.length, scales, self._most_tokens)
        end = self.length + numbers.shape[-2]
        self._numbers[..., self.length : end, :] = numbers
        self._scales[..., self.length : end, :] = scales
        self.length = end

    def blocks(self, length: int) -> tuple[torch.Tensor, ...]:
        """Numbers and scales of the first `length` tokens, in its memory; nothing before the first token."""
        return tuple(part[..., :length, :] for part in (self._numbers, self._scales) if part is not None)

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

    def read(self, dtype: torch.dtype) -> torch.Tensor:
        """All that is held, `[batch, heads, tokens, width]`, in memory of its own."""
        assert self._numbers is not None, "nothing was appended"
        shape = *self.shape[:-2], self.length, self.shape[-1]
        out = torch.empty(shape, dtype=dtype, device=self._numbers.device)
        self._convert(out)
        return out

    def read_room(self, out: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        """`out [batch, heads, room, width]`, with the first `length` int64 `[1]` tokens in it.

        Where nobody may wait for `length`, which is not on a CPU, with all that there is room for.
        """

        def work() -> None:
            self._convert(out[..., : int(length), :])

        if out.device.type == "cpu":
            step_graph.opaque(work)
        else:
            self._convert(out)
        return out

    def _convert(self, out: torch.Tensor) -> None:
        """Write the first tokens, as many as `out` is for."""
        assert self._numbers is not None and self._scales is not None, "nothing was appended"
        end, blocks = out.shape[-2], (-1, BLOCK_VALUES)
        scales = self._scales[..., :end, :, None].float()
        torch.mul(self._numbers[..., :end, :].unflatten(-1, blocks), scales, out=out.unflatten(-1, blocks))

    @property
    def shape(self) -> torch.Size:
        """Of the room, `[batch, heads, room, width]`."""
        assert self._numbers is not None, "nothing was appended"
        return self._numbers.shape

    @property
    def room(self) -> int:
        """Tokens that there is memory for."""
        return 0 if self._numbers is None else self._numbers.shape[-2]

    @property
    def num_bytes(self) -> int:
        """Memory taken."""
        return sum(part.nbytes for part in (self._numbers, self._scales) if part is not None)


class FloatRooms:
    """Where layers, one after the other, have as floats what attention reads: one room of keys and one of values.

    They grow when a layer does, which is before a step that is captured.
    """

    def __init__(self) -> None:
        self._memory: dict[int, torch.Tensor] = {}

    def of(self, place: int, shape: torch.Size, like: torch.Tensor) -> torch.Tensor:
        """A room `shape` with the dtype and device of `like`, what the layer before has left in it, or zeros."""
        memory = self._memory.get(place)
        if memory is None or len(memory) < shape.numel() or memory.dtype != like.dtype or memory.device != like.device:
            memory = self._memory[place] = like.new_zeros(shape.numel())
        return memory[: shape.numel()].view(shape)


def _blocks_of(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers int8 `[..., width]` and their scales float16 `[..., width / 32]`."""
    blocks = states.float().unflatten(-1, (-1, BLOCK_VALUES))
    scales = (blocks.abs().amax(-1) / _LARGEST).clamp_(max=_LARGEST_SCALE).half()
    divisors = torch.where(scales == 0, 1.0, scales.float())[..., None]  # by what is kept, not by what it rounds
    return (blocks / divisors).round_().clamp_(-_LARGEST, _LARGEST).to(torch.int8).flatten(-2), scales
