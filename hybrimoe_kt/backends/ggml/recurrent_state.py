"""What linear attention keeps of one layer and one conversation: a matrix a head, and the latest tokens' channels."""

from __future__ import annotations

import torch

from .building import Region

__all__ = ["RecurrentState"]

_ROOM_TOKENS = 32
"""For which there is room behind the kept ones, so that they move to the beginning once in as many; more if asked."""


class RecurrentState:
    """Matrices float32 `[heads, values, keys]`, and columns float32 `[tokens, channels]` as a convolution reads them.

    Room for the answers to as many tokens is in front of the matrices, as the graph's operation has them.
    """

    def __init__(self, channels: int, num_kept: int, heads: int, width: int) -> None:
        """`num_kept`: how many tokens a convolution looks back at beside its own."""
        self.num_kept, self._heads, self._width = num_kept, heads, width
        self.length = self.place = 0
        """Tokens held, and the row where the first of the kept columns is."""
        self.capacity = _ROOM_TOKENS
        """Tokens of one step that there is room for."""
        with torch.inference_mode(False):
            self.columns = Region(torch.zeros(num_kept + self.capacity, channels))
        self.state = Region(self._matrices())

    @property
    def regions(self) -> tuple[Region, Region]:
        """What graphs read and write."""
        return self.columns, self.state

    @property
    def facts(self) -> tuple[int, int, int, int]:
        """Addresses of columns and matrices, the row of the first kept column, and tokens that a step may have."""
        return self.columns.address, self.state.address, self.place, self.capacity

    @property
    def num_bytes(self) -> int:
        """Memory taken."""
        return sum(region.memory.untyped_storage().nbytes() for region in self.regions)

    @property
    def matrices(self) -> torch.Tensor:
        """The state itself, `[heads, values, keys]`."""
        return self.state.memory

    @property
    def kept(self) -> torch.Tensor:
        """The columns of the latest tokens, `[num_kept, channels]`; zeros before the first."""
        return self.columns.memory[self.place : self.place + self.num_kept]

    def reserve(self, num_tokens: int) -> None:
        """Have room for a conversation of so many tokens."""
        tokens = num_tokens - self.length
        if tokens > self.capacity:
            self.capacity = tokens
            matrices = self._matrices()
            matrices.copy_(self.matrices)
            self.state.replace(matrices)
            with torch.inference_mode(False):
                columns = torch.zeros(self.num_kept + tokens, self.columns.memory.shape[1])
            self._begin_anew(self.kept, columns)
        elif self.place + self.num_kept + tokens > len(self.columns.memory):
            self._begin_anew(self.kept.clone(), self.columns.memory)

    def _begin_anew(self, kept: torch.Tensor, memory: torch.Tensor) -> None:
        memory[: self.num_kept] = kept
        self.columns.replace(memory)
        self.place = 0

    @torch.inference_mode(False)
    def _matrices(self) -> torch.Tensor:
        answers = self.capacity * self._heads * self._width
        memory = torch.zeros(answers + self._heads * self._width**2)
        return memory[answers:].view(self._heads, self._width, self._width)

    def advance(self, tokens: int) -> None:
        """Hold so many more, which a graph has written behind the kept ones."""
        self.length += tokens
        self.place += tokens

    def append(self, columns: torch.Tensor) -> None:
        """Take more tokens' columns, float32 `[tokens, channels]`; who computed them writes the matrices as well."""
        latest = torch.cat((self.kept, columns))[len(columns) :]
        self._begin_anew(latest, self.columns.memory)
        self.length += len(columns)

    def clear(self) -> None:
        """Forget all tokens; the memory stays."""
        self.length = self.place = 0
        self.columns.memory.zero_()
        self.matrices.zero_()
