"""A conversation's tokens, and what the model's layers keep of them; copies of it, and ways back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .growing_cache import GrowingCache, layer_bytes
from .layer_states import LayerStates, can_shorten, states_of, with_states

__all__ = ["Conversation", "common_length"]

_MOST_MARKS = 4
"""Turns that a conversation of recurrent states can go back to; 75 MB each with Qwen3-Next-80B. A choice."""


class Conversation:
    """Token ids that were computed, and the cache that holds them."""

    def __init__(self, cache: GrowingCache) -> None:
        self.cache = cache
        self.ids: list[int] = []
        self.num_before = 0
        """How many of them stand before the last answer's turn."""
        self._marks: dict[int, list[LayerStates | None]] = {}
        """Length -> the states, at that length, of layers that cannot be shortened; on the host."""

    def begin_anew(self, cache: GrowingCache) -> None:
        """Hold nothing, in another memory."""
        self.cache, self.ids, self._marks = cache, [], {}

    @property
    def num_bytes(self) -> int:
        """Memory taken, marks included."""
        held = sum(layer_bytes(layer) for layer in self.cache.layers)
        return held + sum(_num_bytes(states) for states in list(self._marks.values()))

    @property
    def is_croppable(self) -> bool:
        """Whether it can go back to any length."""
        return self.cache.is_croppable and all(map(can_shorten, self.cache.layers))

    def mark(self, lasting: int = 0) -> None:
        """Remember how to come back to what is held now, where that cannot be had by leaving tokens out.

        Of too many marks the shortest are forgotten, but for the one of the length `lasting`.
        """
        if self.is_croppable or not self.ids or len(self.ids) in self._marks:
            return
        if not all(can_shorten(layer) or states_of(layer, len(self.ids)) for layer in self.cache.layers):
            return  # a layer of whose states nothing is known here
        found = [None if can_shorten(layer) else states_of(layer, len(self.ids)) for layer in self.cache.layers]
        self._marks[len(self.ids)] = [None if one is None else one.copied("cpu") for one in found]
        while len(self._marks) > _MOST_MARKS:
            del self._marks[min(length for length in self._marks if length != lasting)]

    def reach(self, prompt: Sequence[int]) -> int:
        """How many of a prompt's tokens it can go on from: those they share, or fewer; at most all but the last."""
        common = common_length(self.ids, prompt[:-1])
        if common == len(self.ids) or self.cache.is_croppable:
            return common
        return max((length for length in self._marks if length <= common), default=0)

    def go_back(self, length: int) -> None:
        """Forget all but the first `length` tokens, as many as `reach` has said."""
        surplus = len(self.ids) - length
        if surplus and self.cache.is_croppable:
            self.cache.crop(-surplus)  # this version of Transformers counts from the end only
        elif surplus:
            layers: Any = self.cache.layers
            for layer, states in zip(layers, self._marks[length], strict=True):
                if states is None:
                    layer.crop(-surplus)
                else:
                    with_states(layer, states)
        self.ids = self.ids[:length]
        self._marks = {at: states for at, states in self._marks.items() if at <= length}

    def states(self, length: int) -> list[LayerStates] | None:
        """What layers hold of the first `length` tokens, in their memory; None where a layer's cannot be had."""
        marked = self._marks.get(length)
        is_whole = length == len(self.ids)
        found: list[LayerStates] = []
        for place, layer in enumerate(self.cache.layers):
            states = None
            if is_whole or can_shorten(layer):
                states = states_of(layer, length)
            elif marked is not None:
                states = marked[place]
            if states is None:
                return None
            found.append(states)
        return found

    def marks_up_to(self, length: int) -> dict[int, list[LayerStates | None]]:
        """Marks that a copy of the first `length` tokens has as well; they are never written to."""
        return {at: states for at, states in self._marks.items() if at <= length}

    @torch.inference_mode()
    def fill(
        self, ids: Sequence[int], states: Sequence[LayerStates], marks: dict[int, list[LayerStates | None]]
    ) -> None:
        """Hold copies of another's tokens and states; it has held nothing, or forgotten it."""
        for layer, each in zip(self.cache.layers, states, strict=True):
            with_states(layer, each)
        self.ids, self._marks = list(ids), dict(marks)


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    end = min(len(first), len(second))
    if list(first[:end]) == list(second[:end]):
        return end
    low = 0
    while low + 1 < end:  # halves that are compared at once are much quicker than a token after the other
        middle = (low + end) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            end = middle
    return low + (low < end and first[low] == second[low])


def _num_bytes(states: Sequence[LayerStates | None]) -> int:
    return sum(each.num_bytes for each in states if each is not None)
