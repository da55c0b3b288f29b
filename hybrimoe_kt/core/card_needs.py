"""What a model takes of one card, as lines that add up: everything but slots for experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from .step_memory import StepShape

__all__ = ["CardNeeds", "Kept", "Line"]


class Line(NamedTuple):
    """One use of a card's memory."""

    name: str
    num_bytes: int


class Kept(NamedTuple):
    """What a layer keeps of a conversation: numbers a token in each of two tensors, or a state of constant size."""

    keys: int = 0
    values: int = 0
    state_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CardNeeds:
    """What a model takes of one card, as far as it does not depend on the length of the context; bytes.

    `slot_bytes` and `num_experts` are by layer, of those whose experts the card has kernels for; `all_experts` counts
    those of every layer that it serves.
    """

    packed_bytes: int = 0
    """Dense matrices as the file has them."""
    float_bytes: int = 0
    kept: tuple[Kept, ...] = ()
    cache_value_bytes: float = 2.0
    """Of a number that is kept of a token."""
    step: StepShape | None = None
    """None where no layer's dense part stands on the card."""
    expert_bytes: int = 0
    """Workspace of the experts' kernels, and the buffers around them."""
    linear_bytes: int = 0
    """Workspace of the kernels for packed dense matrices."""
    attention_bytes: int = 0
    """Workspace of attention."""
    streaming_bytes: int = 0
    context_bytes: int = 0
    """Of CUDA's context, where it is taken from the card's size."""
    library_bytes: int = 0
    reserve_bytes: int = 0
    slot_bytes: Mapping[int, int] = field(default_factory=dict)
    num_experts: Mapping[int, int] = field(default_factory=dict)
    all_experts: int = 0

    @property
    def dense_bytes(self) -> int:
        return self.packed_bytes + self.float_bytes

    @property
    def kernel_bytes(self) -> int:
        return self.expert_bytes + self.linear_bytes + self.attention_bytes

    def cache_bytes(self, context_tokens: int) -> int:
        """Keys, values and states of a conversation, and a second copy of the largest tensor while it grows."""
        numbers = sum(each.keys + each.values for each in self.kept)
        copied = max((max(each.keys, each.values) for each in self.kept), default=0)
        states = sum(each.state_bytes for each in self.kept)
        return round((numbers + copied) * context_tokens * self.cache_value_bytes) + states

    def lines(self, context_tokens: int) -> tuple[Line, ...]:
        """Everything but slots, for a conversation of so many tokens."""
        return (
            Line("dense weights, packed", self.packed_bytes),
            Line("dense weights, floats", self.float_bytes),
            Line(f"keys and values of {context_tokens} tokens", self.cache_bytes(context_tokens)),
            Line("activations of a step", self.step.num_bytes(context_tokens) if self.step else 0),
            Line("the kernels' workspace and buffers", self.kernel_bytes),
            Line("prefill streaming", self.streaming_bytes),
            Line("CUDA's context (assumed)", self.context_bytes),
            Line("libraries (assumed)", self.library_bytes),
            Line("left free (reserve_bytes)", self.reserve_bytes),
        )

    def num_bytes(self, context_tokens: int) -> int:
        return sum(line.num_bytes for line in self.lines(context_tokens))
