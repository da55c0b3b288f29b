"""What a model takes of one card, line by line, before anything is allocated: arithmetic on sizes.

The same functions plan a load, fill `hybrimoe doctor`'s table and compute the documentation's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hybrimoe_kt.errors import CapacityError
from hybrimoe_kt.sizes import CacheSize, size_text

from .card_needs import CardNeeds, Line

__all__ = [
    "CONTEXT_BYTES",
    "DEFAULT_CONTEXT_TOKENS",
    "LIBRARY_BYTES",
    "MemoryPlan",
    "plan_card",
    "slots_for",
]

CONTEXT_BYTES = 512 * 2**20
"""Of a card, for CUDA's context. An assumption until it is measured; what torch calls free is without it."""
LIBRARY_BYTES = 256 * 2**20
"""For cuBLAS' workspace and the kernels' code, which come with the first steps. An assumption until it is measured."""
DEFAULT_CONTEXT_TOKENS = 8192
"""Planned for where nobody names a context and the model's own is not shorter. A choice."""
_LEAST_CONTEXT_TOKENS = 256
"""Without room for so many, a card is of no use. A choice."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Where a card's memory goes; `card_bytes` is what may be taken of it."""

    card: str
    card_bytes: int
    context_tokens: int
    most_tokens: int
    """The model's own limit, or what was asked for."""
    needs: CardNeeds
    slots: Mapping[int, int]
    """Layer -> how many."""
    refusal: str | None = None
    """Why this cannot be, in one sentence with numbers."""

    @property
    def lines(self) -> tuple[Line, ...]:
        """Every use but slots that takes anything."""
        return tuple(line for line in self.needs.lines(self.context_tokens) if line.num_bytes)

    @property
    def left_bytes(self) -> int:
        """For slots; 0 where the lines take more than there is."""
        return max(0, self.card_bytes - self.needs.num_bytes(self.context_tokens))

    @property
    def step_bytes(self) -> int:
        """What steps will take: all lines but the dense weights and the context, which are there before."""
        return self.needs.num_bytes(self.context_tokens) - self.needs.dense_bytes - self.needs.context_bytes

    @property
    def fits(self) -> bool:
        """Whether the lines do, without any slot."""
        return self.needs.num_bytes(self.context_tokens) <= self.card_bytes

    @property
    def slots_bytes(self) -> int:
        return sum(count * self.needs.slot_bytes[layer] for layer, count in self.slots.items())

    @property
    def slots_per_layer(self) -> int:
        """Of the layer that has fewest."""
        return min(self.slots.values(), default=0)

    @property
    def expert_share(self) -> float:
        """Of the experts of all layers that the card serves, from 0 to 1."""
        return sum(self.slots.values()) / self.needs.all_experts if self.needs.all_experts else 0.0

    def rows(self) -> list[tuple[str, str]]:
        """The table for people: what for, and how much."""
        slots = f"slots: {self.slots_per_layer} a layer, {self.expert_share:.1%} of the experts"
        unused = self.left_bytes - self.slots_bytes
        rows = [*self.lines, Line(slots, self.slots_bytes), Line("unused", max(0, unused))]
        return [(line.name, size_text(line.num_bytes)) for line in rows]

    def line(self) -> str:
        """The plan in one line."""
        needs, tokens = self.needs, self.context_tokens
        dense, cache = size_text(needs.dense_bytes), size_text(needs.cache_bytes(tokens))
        rest = needs.num_bytes(tokens) - needs.dense_bytes - needs.cache_bytes(tokens)
        named = "" if tokens == self.most_tokens else f" (of {self.most_tokens}: --cache_lens plans for others)"
        return (
            f"{self.card} has {size_text(self.card_bytes)}: dense weights {dense}, keys and values of {tokens} "
            f"tokens{named} {cache}, steps and what stays free {size_text(rest)}, {self.slots_per_layer} slots a "
            f"layer {size_text(self.slots_bytes)}, {self.expert_share:.0%} of the experts"
        )

    def as_dict(self) -> dict[str, Any]:
        """The same as data."""
        return {
            "card": self.card,
            "card_bytes": self.card_bytes,
            "context_tokens": self.context_tokens,
            "most_tokens": self.most_tokens,
            "lines": {line.name: line.num_bytes for line in self.lines},
            "left_bytes": self.left_bytes,
            "slots_bytes": self.slots_bytes,
            "slots_per_layer": self.slots_per_layer,
            "expert_share": round(self.expert_share, 4),
            "fits": self.fits,
            "refusal": self.refusal,
        }


def slots_for(
    size: CacheSize, slot_bytes: Mapping[int, int], num_experts: Mapping[int, int], left_bytes: int
) -> dict[int, int]:
    """Return layer -> number of slots; "auto" takes `left_bytes`. A layer never gets more slots than it has experts.

    Fractions and budgets are spread evenly over the layers.
    """
    if size.per_layer is not None:
        wanted = dict.fromkeys(slot_bytes, size.per_layer)
    elif size.fraction is not None:
        wanted = {layer: round(size.fraction * num_experts[layer]) for layer in slot_bytes}
    else:
        budget = left_bytes if size.num_bytes is None else size.num_bytes
        one_each = sum(slot_bytes.values())
        wanted = dict.fromkeys(slot_bytes, budget // one_each if one_each else 0)
    return {layer: min(count, num_experts[layer]) for layer, count in wanted.items()}


def plan_card(
    card: str,
    card_bytes: int,
    needs: CardNeeds,
    *,
    size: CacheSize,
    most_tokens: int,
    context_tokens: int | None = None,
    refuses: bool = True,
) -> MemoryPlan:
    """Plan a conversation of `context_tokens`, by default what has room of 8192; `most_tokens` is the model's limit.

    With `refuses`, CapacityError where the dense part, or the context named, does not fit beside the slots asked for.
    """
    asked = slots_for(size, needs.slot_bytes, needs.num_experts, 0)
    asked_bytes = sum(count * needs.slot_bytes[layer] for layer, count in asked.items())
    limit = min(context_tokens or DEFAULT_CONTEXT_TOKENS, most_tokens)
    largest = _largest(most_tokens, lambda tokens: needs.num_bytes(tokens) + asked_bytes <= card_bytes)
    refusal = _refusal(card, card_bytes, needs, asked_bytes, limit, largest, is_named=context_tokens is not None)
    if refuses and refusal is not None:
        raise CapacityError(refusal)
    tokens = limit if context_tokens is not None else max(1, min(limit, largest))
    left = max(0, card_bytes - needs.num_bytes(tokens))
    slots = slots_for(size, needs.slot_bytes, needs.num_experts, left)
    most = most_tokens if context_tokens is None else tokens
    return MemoryPlan(card, card_bytes, tokens, most, needs, slots, refusal)


def _refusal(
    card: str, card_bytes: int, needs: CardNeeds, asked_bytes: int, limit: int, largest: int, *, is_named: bool
) -> str | None:
    context = f", {size_text(needs.context_bytes)} of it for CUDA's context" if needs.context_bytes else ""
    has = f"{card} has {size_text(card_bytes)}{context}"
    dense = f"dense weights of {size_text(needs.dense_bytes)}"
    slots = f" and {size_text(asked_bytes)} of slots" if asked_bytes else ""
    least, there = min(_LEAST_CONTEXT_TOKENS, limit), needs.dense_bytes + needs.context_bytes
    if there > card_bytes:
        return (
            f"the dense weights take {size_text(needs.dense_bytes)}, {has}; take a larger card, several (a rule file "
            f"divides layers), a file of fewer bits, or --accelerator none"
        )
    if largest < least:
        return (
            f"beside {dense}{slots}, steps, what stays free and a context of {least} tokens take "
            f"{size_text(needs.num_bytes(least) - there)}, {has}; give a smaller cache_size, "
            f"--chunk_size or reserve_bytes, or --accelerator none"
        )
    if is_named and largest < limit:
        return (
            f"a context of {limit} tokens, its steps and what stays free take "
            f"{size_text(needs.num_bytes(limit) - there)} beside {dense}{slots}, {has}; the largest that "
            f"fits is {largest} tokens"
        )
    return None


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """Return the largest number up to `most` that fits, where no larger one does once one does not; 0 for none."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
