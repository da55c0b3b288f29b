"""A graph's tensors as 64-bit words: their sizes, strides and addresses follow from a table, many written at once."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_int64
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .library import DATA

__all__ = ["FACTS", "Addresses", "Fact", "Word", "Words", "words_of"]

Integers = npt.NDArray[np.int64]


class Fact(IntEnum):
    """What is known of each row: of a conversation that has a token in the step. The first four are a layer's."""

    FIRST = 0
    """Address of keys, or of a convolution's columns."""
    SECOND = 1
    """Of values, or of a state."""
    PLACE = 2
    """The token that comes next; of columns, the first one kept."""
    CAPACITY = 3
    """Tokens that there is memory for."""
    MASK = 4
    """Address of what it sees."""
    SEEN = 5
    """Tokens looked at."""


FACTS = len(Fact)


class Word(NamedTuple):
    """`word` of `tensor` is `factor` times one fact of a row, plus `offset` and `steps` times its `PLACE`."""

    tensor: int
    word: int
    row: int
    fact: Fact
    factor: int = 1
    offset: int = 0
    steps: int = 0


class Words:
    """Writes some words of tensors, which have to stay alive."""

    def __init__(self, words: Sequence[Word]) -> None:
        self._words, self._at = _memory([word.tensor for word in words], [word.word for word in words])
        columns = [
            (word.row * FACTS + word.fact, word.factor, word.row * FACTS + Fact.PLACE, word.steps, word.offset)
            for word in words
        ]
        self._fact, factor, self._place, self._steps, offset = np.array(columns, dtype=np.int64).T.copy()
        self._factor = None if (factor == 1).all() else factor
        self._offset = offset if offset.any() else None
        self._found, self._walked = np.empty_like(self._fact), np.empty_like(self._fact)

    def write(self, facts: Integers) -> None:
        """From `[rows, facts]`, one row after the other."""
        found, walked = self._found, self._walked
        facts.take(self._fact, out=found, mode="clip")  # which looks at each index no longer than it has to
        if self._factor is not None:
            found *= self._factor
        facts.take(self._place, out=walked, mode="clip")
        walked *= self._steps
        found += walked
        if self._offset is not None:
            found += self._offset
        self._words[self._at] = found


class Addresses:
    """Writes where the values of some tensors are: so many bytes behind one of a list of addresses."""

    def __init__(self, tensors: Sequence[int], numbers: Sequence[int], offsets: Sequence[int]) -> None:
        self._words, self._at = _memory(tensors, [DATA] * len(tensors))
        self._numbers, self._offsets = np.array(numbers, dtype=np.int64), np.array(offsets, dtype=np.int64)

    def write(self, addresses: Integers) -> None:
        self._words[self._at] = addresses[self._numbers] + self._offsets


def words_of(tensor: int) -> Any:
    """A tensor's words, as they can be read and written."""
    return (c_int64 * (DATA + 1)).from_address(tensor)


def _memory(tensors: Sequence[int], words: Sequence[int]) -> tuple[Integers, Integers]:
    """All memory from the first to the last tensor, and where in it these words are."""
    if not tensors:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    first, last = min(tensors), max(tensors)
    memory = (c_int64 * ((last - first) // 8 + DATA + 1)).from_address(first)
    at = [(tensor - first) // 8 + word for tensor, word in zip(tensors, words, strict=True)]
    return np.frombuffer(memoryview(memory), dtype=np.int64), np.array(at, dtype=np.int64)
