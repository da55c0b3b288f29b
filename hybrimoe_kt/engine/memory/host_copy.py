"""A conversation that holds no memory of an accelerator's, nor of a cache's: what layers kept, on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .conversation import Conversation, common_length
from .layer_states import LayerStates

__all__ = ["HostCopy"]


@dataclass(slots=True, eq=False)
class HostCopy:
    """What `Conversation.fill` takes; fields as there."""

    ids: list[int]
    num_before: int
    states: list[LayerStates]
    marks: dict[int, list[LayerStates | None]]
    is_croppable: bool

    @classmethod
    def of(cls, conversation: Conversation, *, copies: bool = True) -> HostCopy | None:
        """All that it holds; None where a layer's states cannot be had. Without `copies` it may be its own memory."""
        ids, states = list(conversation.ids), conversation.states(len(conversation.ids))
        if states is None:
            return None
        if copies:
            states = [each.copied("cpu") for each in states]
        marks = conversation.marks_up_to(len(ids))
        return cls(ids, conversation.num_before, states, marks, conversation.is_croppable)

    @property
    def num_bytes(self) -> int:
        marked = (each for states in self.marks.values() for each in states if each is not None)
        return sum(each.num_bytes for each in (*self.states, *marked))

    def reach(self, prompt: Sequence[int]) -> int:
        """As `Conversation.reach`."""
        common = common_length(self.ids, prompt[:-1])
        if common == len(self.ids) or self.is_croppable:
            return common
        return max((length for length in self.marks if length <= common), default=0)
