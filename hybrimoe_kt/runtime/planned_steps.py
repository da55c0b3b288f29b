"""What a device has decided about a token, read back for those who want to know: as plans, routings and transfers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from hybrimoe_kt.core.decision_table import DecisionTable
from hybrimoe_kt.core.device_coordinator import as_plan, as_transfer
from hybrimoe_kt.core.device_rules import BROUGHT, Copy, Step
from hybrimoe_kt.core.types import LayerSpec, Plan, Routing, Transfer
from hybrimoe_kt.device.backend import Routed
from hybrimoe_kt.device.readback import Guesses

__all__ = ["PlannedStep", "Seen", "planned_step"]


class Seen:
    """What a layer was given, kept on the device beside the step: captured with it, so that every replay writes it."""

    __slots__ = ("ids", "logits", "scores", "weights")

    def __init__(self, routed: Routed, scores: torch.Tensor | None) -> None:
        self.ids, self.weights = torch.empty_like(routed.ids), torch.empty_like(routed.weights)
        self.scores = None if scores is None else torch.empty_like(scores)
        self.logits = None if routed.logits is None else torch.empty_like(routed.logits)

    def takes(self, routed: Routed, scores: torch.Tensor | None) -> bool:
        """Whether it has room for all that is given, and no more: others may listen than did when it was made."""
        return (self.scores is None, self.logits is None) == (scores is None, routed.logits is None)

    def keep(self, routed: Routed, scores: torch.Tensor | None) -> None:
        """Enqueue the copies."""
        self.ids.copy_(routed.ids)
        self.weights.copy_(routed.weights)
        if self.scores is not None and scores is not None:
            self.scores.copy_(scores)
        if self.logits is not None and routed.logits is not None:
            self.logits.copy_(routed.logits)


class PlannedStep(NamedTuple):
    """One layer of a token that has ended."""

    plan: Plan
    routing: Routing
    ahead: tuple[Transfer, ...]
    """What was ordered ahead of need while it ran."""
    weights: torch.Tensor
    logits: torch.Tensor | None
    guesses: Guesses | None
    share_s: tuple[float, float] | None
    """When the CPU began and ended its share, where it had one."""


def planned_step(
    specs: Sequence[LayerSpec],
    place: int,
    table: DecisionTable,
    record: Sequence[int],
    issued: Sequence[int],
    seen: Seen,
    guesses: Guesses | None,
    share_s: tuple[float, float] | None,
) -> PlannedStep:
    """What the layer at `place` was given and what was decided, from its `record` (see `kernels.plan_tables`).

    `issued [num_slots]` tells in which order copies were ordered.
    """
    spec, top_k = specs[place], table.top_k
    ids, doing, slots, evicted = (tuple(record[part * top_k : (part + 1) * top_k]) for part in range(4))
    brought = [at for at, what in enumerate(doing) if what == BROUGHT]
    brought.sort(key=lambda at: issued[slots[at]])
    copies = tuple(Copy(ids[at], slots[at], evicted[at], issued[slots[at]]) for at in brought)
    entry, num_ahead = record[4 * top_k : 4 * top_k + 2]
    step = Step(ids, doing, slots, copies, entry, table.entry(entry).room)
    scores = None if seen.scores is None else seen.scores.tolist()
    weights = seen.weights.to("cpu", copy=True)
    shares = dict(zip(ids, weights.tolist()[0], strict=True))
    ahead = []
    for number in range(num_ahead):
        at, expert, slot, old = record[4 * top_k + 2 + 4 * number :][:4]
        num_bytes = specs[at].expert_bytes
        ahead.append(as_transfer(specs[at].layer, Copy(expert, slot, old, 0), num_bytes, "prefetch"))
    return PlannedStep(
        as_plan(spec, step, table, issued),
        Routing(spec.layer, dict.fromkeys(ids, 1), 1, scores, shares),
        tuple(ahead),
        weights,
        None if seen.logits is None else seen.logits.to("cpu", copy=True),
        guesses,
        share_s,
    )
