"""What kernels that plan read and write: every layer's slots and scores, and what one token's step leaves behind.

All of one accelerator's layers, as rows as long as the longest; a layer is known by its place among them. Everything is
int32, and on the device unless said otherwise. The rules are those of `hybrimoe_kt.core.device_rules`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = [
    "ARRIVING",
    "BROUGHT",
    "FREE",
    "HELD",
    "LRU",
    "MRS",
    "ON_CPU",
    "LayerRow",
    "PlanForm",
    "PlanTables",
    "Posted",
    "SlotAddresses",
    "StepOutputs",
    "record_size",
]

FREE = -1
HELD, ARRIVING, BROUGHT, ON_CPU = range(4)
MRS, LRU = range(2)
Allocate = Callable[[int], torch.Tensor]
"""Number of values -> int32 memory for them, `[num_values]`."""


@dataclass(frozen=True, slots=True)
class PlanForm:
    """What is a constant of compiled code: of all layers of a model that are alike.

    `policy` MRS or LRU; `alpha` in units of 2^-16; `kept` how many probabilities enter the averages, 0 for LRU;
    `prefetch_size` the most copies that one `look_ahead` orders.
    """

    num_experts: int
    top_k: int
    policy: int = MRS
    alpha: int = 1966
    kept: int = 1
    bypass: bool = False
    prefetch_size: int = 1
    admission: bool = True


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One layer's part of the tables, views; `place` is its number among the layers."""

    place: int
    num_slots: int
    slot_of: torch.Tensor
    """`[num_experts]`: expert -> slot, or FREE."""
    expert_of: torch.Tensor
    """`[num_slots]`: slot -> expert, or FREE."""
    scores: torch.Tensor
    """`[num_experts]`: what experts are worth, see `core.device_rules`."""
    issued: torch.Tensor
    """`[num_slots]`: the number of the last copy ordered into a slot; written by whoever orders copies."""
    landed: torch.Tensor
    """`[num_slots]`: the number of the last copy that is through; written by `fetch`'s second launch alone."""
    counts: torch.Tensor
    """`[2]`: experts routed so far (the clock), copies ordered so far."""
    table: torch.Tensor
    """`[side^3]`, side = top_k + 1: by (held * side + arriving) * side + missing, see `core.DecisionTable.packed`."""
    gains: torch.Tensor
    """`[side^3]`: nanoseconds by which a step is shorter with one more held, by the same index."""
    visits: torch.Tensor
    """`[side^3]`: how often each entry was followed."""
    totals: torch.Tensor
    """`[4]`: experts brought, experts on the CPU, prefetches into this layer, admissions."""
    hits: torch.Tensor
    """`[num_experts]`: steps that routed to an expert and found it ready."""
    misses: torch.Tensor
    """`[num_experts]`: and did not."""
    record: torch.Tensor
    """`[record_size]`: what the last step decided. ids, doing, slots, evicted `[top_k]` each, evicted FREE where nobody
    was; the table's index; the number of copies that `look_ahead` ordered, 0 until it has, and for each of up to
    prefetch_size: place of the layer, expert, slot, evicted. What stands beyond them is of earlier steps."""


@dataclass(frozen=True, slots=True)
class StepOutputs:
    """What a step's other launches read; written anew by every `plan_step`."""

    resident: torch.Tensor
    """`[num_experts]`: expert -> slot of those computed at once, -1 elsewhere."""
    late: torch.Tensor
    """`[num_experts]`: expert -> slot of those computed once they are there, arriving or brought, -1 elsewhere."""
    copies: torch.Tensor
    """`[top_k, 3]`: expert, slot and number of each copy in link order, -1 beyond the last."""
    on_cpu: torch.Tensor
    """`[1]`: whether anything is the CPU's."""


@dataclass(frozen=True, slots=True)
class Posted:
    """What the CPU is asked in one layer, in host memory that both sides see; if nothing, only `done` is set.

    The device writes everything else, then 0 to `done`, then 1 to `asked`; the host 1 to `done` once it has
    answered.
    """

    inbox: torch.Tensor
    """`[hidden_size]`: the token's states, of their own type."""
    ids: torch.Tensor
    """int64 `[top_k]`: as routed, -1 for what is not the CPU's."""
    weights: torch.Tensor
    """float32 `[top_k]`"""
    asked: torch.Tensor
    """`[1]`"""
    done: torch.Tensor
    """`[1]`"""


@dataclass(frozen=True, slots=True)
class SlotAddresses:
    """Where experts lie and where they go, int64 `[num_layers]` on the device; everything a multiple of 16."""

    sources: torch.Tensor
    """Address of each layer's first expert, page-locked host memory; one expert follows the other."""
    targets: torch.Tensor
    """Address of each layer's first slot."""
    slot_bytes: torch.Tensor


def record_size(form: PlanForm) -> int:
    """Numbers in a layer's record."""
    return 4 * form.top_k + 2 + 4 * form.prefetch_size


class PlanTables:
    """The rows of layers that are alike but for their slots and their decision tables."""

    def __init__(self, form: PlanForm, num_slots: list[int], class_of: list[int], allocate: Allocate) -> None:
        """`num_slots` of each layer, `class_of` the number of its decision table; `allocate` gives int32 memory."""
        self.form, self.num_slots = form, num_slots
        num_layers, entries, classes = len(num_slots), (form.top_k + 1) ** 3, max(class_of) + 1
        widths = {
            "slot_of": form.num_experts, "expert_of": max(num_slots), "scores": form.num_experts,
            "issued": max(num_slots), "landed": max(num_slots), "counts": 2, "visits": entries, "totals": 4,
            "hits": form.num_experts, "misses": form.num_experts, "record": record_size(form),
        }  # fmt: skip
        self.parts = {name: allocate(num_layers * width).view(num_layers, width) for name, width in widths.items()}
        """By name of a `LayerRow`'s field, `[num_layers, width]`."""
        self.tables, self.gains = (allocate(classes * entries).view(classes, entries) for _ in range(2))
        """`[num_classes, side^3]`."""
        self.slot_counts, self.class_of = allocate(num_layers), allocate(num_layers)
        """`[num_layers]`: as given, for `look_ahead`."""
        for part in (*self.parts.values(), self.tables, self.gains):
            part.zero_()
        for name in ("slot_of", "expert_of"):
            self.parts[name].fill_(FREE)
        self.slot_counts.copy_(torch.tensor(num_slots, dtype=torch.int32))
        self.class_of.copy_(torch.tensor(class_of, dtype=torch.int32))
        self.rows = [self._row(place, count, class_of[place]) for place, count in enumerate(num_slots)]

    def _row(self, place: int, num_slots: int, number: int) -> LayerRow:
        by_slot = ("expert_of", "issued", "landed")
        fields = {
            name: part[place][:num_slots] if name in by_slot else part[place] for name, part in self.parts.items()
        }
        return LayerRow(place, num_slots, table=self.tables[number], gains=self.gains[number], **fields)
