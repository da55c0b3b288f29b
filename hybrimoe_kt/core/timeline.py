"""What worked when: spans of time on the lanes of a machine, simulated or real."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from .types import Plan, Transfer

__all__ = ["MAX_SPANS", "Kind", "Span", "Timeline", "experts_label", "plan_details"]

Kind = Literal["step", "scheduler", "gpu", "cpu", "link"]
MAX_SPANS = 100_000
"""Some 60 MB, and 400 tokens of a model of 48 layers."""


class Span(NamedTuple):
    """One piece of work on one lane.

    `lane` is the accelerator's number (0 for what there is one of). `work` is "replay", "wait for routing", "plan" or
    "choose prefetches" on the scheduler's lane, "experts", "shared", "dense" or "head" where something is computed,
    "on_demand" or "prefetch" on a link, "prefill" or "decode" for a whole step. `experts` are the routed experts it is
    about, of `layer`.
    """

    kind: Kind
    lane: int
    start_s: float
    end_s: float
    label: str
    work: str = ""
    layer: int = -1
    experts: tuple[int, ...] = ()
    details: Mapping[str, Any] | None = None
    """Further facts as plain data, such as the number of the plan that this belongs to."""

    @property
    def lane_name(self) -> str:
        """The row it is drawn in."""
        names = {"step": "steps", "scheduler": "scheduler", "cpu": "CPU"}
        return names.get(self.kind) or f"{'GPU' if self.kind == 'gpu' else 'link'} {self.lane}"


class Timeline:
    """Collects at most `capacity` spans, in any order; `num_dropped` is 0 as long as nothing is missing."""

    def __init__(self, capacity: int = MAX_SPANS, **info: Any) -> None:
        self.capacity, self.info = capacity, info
        """`info`: where the spans come from and how their times are known."""
        self.spans: list[Span] = []
        self.num_dropped = 0

    @property
    def is_full(self) -> bool:
        return len(self.spans) >= self.capacity

    def add(self, span: Span) -> None:
        """Take a span, if there is room."""
        if len(self.spans) < self.capacity:
            self.spans.append(span)
        else:
            self.num_dropped += 1

    @property
    def note(self) -> str | None:
        """What a reader must know about what is missing."""
        return f"only the beginning is kept: {len(self.spans)} spans" if self.num_dropped else None


def experts_label(layer: int, experts: Iterable[int]) -> str:
    """Name a set of experts: L3 E1 E17."""
    return " ".join([f"L{layer}", *(f"E{expert}" for expert in experts)])


def plan_details(number: int, plan: Plan, prefetches: Iterable[Transfer] = ()) -> dict[str, Any]:
    """What a plan decided, as plain data."""
    details: dict[str, Any] = {
        "plan": number,
        "cpu": list(plan.cpu),
        "gpu": list(plan.gpu),
        "transfers": [transfer.expert.index for transfer in plan.transfers],
        "hits": plan.num_hits,
        "predicted_ms": round(plan.makespan_s * 1e3, 6),
    }
    chosen = [list(transfer.expert) for transfer in prefetches]
    return details | ({"prefetches": chosen} if chosen else {})
