"""What a scheduler says of one token's layer step, for every number of experts held, arriving and missing.

One token gives every routed expert a load of 1, so a plan is a choice of three numbers. The scheduler is asked once for
each combination; a device then looks the answer up instead of asking.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from hybrimoe_kt.errors import ConfigError

from .cost import CostModel
from .schedule.base import Assignment, Task
from .schedule.scheduler import Scheduler

__all__ = ["FIELD_BITS", "Decision", "DecisionTable"]

FIELD_BITS = 8
"""Of each number in an entry of `DecisionTable.packed`."""
_MOST = (1 << (FIELD_BITS - 1)) - 1
_NS = 1e9
_MOST_NS = (1 << 31) - 1


class Decision(NamedTuple):
    """A plan by numbers of experts, and what it is predicted to take."""

    transfers: int
    """How many of the missing are brought; the others are the CPU's."""
    left: int
    """How many of those held are left to the CPU."""
    given_up: int
    """How many of those arriving the CPU computes instead of waiting for them, the last to land first."""
    room: int
    """How many more transfers the link has through before the next layer's step begins."""
    makespan_s: float
    """With the overhead of a step."""
    cpu_s: float
    gpu_s: float
    link_s: float


class DecisionTable:
    """Of one class of layers, of one scheduler, profile and pace. An arriving expert has its whole transfer before it.

    So it is in doubt: a device knows that an expert has not landed, not how far it is. The k-th to land is expected
    after k transfers, which is the latest.
    """

    def __init__(self, scheduler: Scheduler, cost: CostModel, top_k: int) -> None:
        """Asks `scheduler` for every combination of up to `top_k` experts. ConfigError where its answer fits none."""
        self.top_k, self.side = top_k, top_k + 1
        if not 1 <= top_k <= _MOST:
            raise ConfigError(f"a decision table is for 1 to {_MOST} experts a token, not {top_k}")
        self._entries = [Decision(0, 0, 0, 0, 0.0, 0.0, 0.0, 0.0)] * self.side**3
        for counts in self._combinations():
            self._entries[self.index(*counts)] = _decide(scheduler, cost, *counts)

    def index(self, held: int, arriving: int, missing: int) -> int:
        """Where the entry of a combination stands."""
        return (held * self.side + arriving) * self.side + missing

    def counts(self, index: int) -> tuple[int, int, int]:
        """The combination whose entry stands there: held, arriving, missing."""
        rest, missing = divmod(index, self.side)
        held, arriving = divmod(rest, self.side)
        return held, arriving, missing

    def decision(self, held: int, arriving: int, missing: int) -> Decision:
        """What is done with so many experts; at most `top_k` together."""
        return self._entries[self.index(held, arriving, missing)]

    def entry(self, index: int) -> Decision:
        """The entry that stands there."""
        return self._entries[index]

    def gain_s(self, held: int, arriving: int, missing: int) -> float:
        """By how many seconds the step is shorter with one of the `missing`, of which there is one, held instead."""
        return (
            self.decision(held, arriving, missing).makespan_s
            - self.decision(held + 1, arriving, missing - 1).makespan_s
        )

    def packed(self) -> list[int]:
        """Every entry in 31 bits, by `index`: transfers, left, given up, room, `FIELD_BITS` each, lowest first."""
        return [
            sum(min(number, _MOST) << (FIELD_BITS * place) for place, number in enumerate(entry[:4]))
            for entry in self._entries
        ]

    def gains_ns(self) -> list[int]:
        """`gain_s` in whole nanoseconds, by `index`; 0 where nothing is missing, and where the gain is rounding."""
        gains = [0] * len(self._entries)
        for held, arriving, missing in self._combinations():
            if missing:
                gain_ns = int(self.gain_s(held, arriving, missing) * _NS)
                gains[self.index(held, arriving, missing)] = min(max(0, gain_ns), _MOST_NS)
        return gains

    def _combinations(self) -> Iterator[tuple[int, int, int]]:
        for held in range(self.side):
            for arriving in range(self.side - held):
                for missing in range(self.side - held - arriving):
                    yield held, arriving, missing


def _decide(scheduler: Scheduler, cost: CostModel, held: int, arriving: int, missing: int) -> Decision:
    """Ask about experts numbered from 0 on: those held, those arriving in the order they land, those missing."""
    task = _task(cost, held, arriving, missing)
    found = scheduler.assign(task) if task.loads else Assignment((), (), (), 0.0, 0.0, 0.0, 0.0)
    on_cpu = set(found.cpu)
    left = sum(expert in on_cpu for expert in range(held))
    given_up = sum(expert in on_cpu for expert in range(held, held + arriving))
    makespan_s = found.makespan_s + cost.step_overhead_s
    room = _room(cost, task, found, makespan_s)
    busy_s = found.cpu_s, found.gpu_s, found.link_s
    return Decision(len(found.transfers), left, given_up, room, makespan_s, *busy_s)


def _task(cost: CostModel, held: int, arriving: int, missing: int) -> Task:
    transfer_s = cost.expert_transfer_s
    arrival_s = {held + place: (place + 1) * transfer_s for place in range(arriving)}
    in_slots = list(range(held + arriving))
    absent = list(range(held + arriving, held + arriving + missing))
    return Task(
        cost,
        dict.fromkeys([*in_slots, *absent], 1),
        in_slots,
        absent,
        arrival_s=arrival_s,
        link_busy_s=arriving * transfer_s,
        shared_s=cost.shared_s[1],
        load=1,
    )


def _room(cost: CostModel, task: Task, found: Assignment, makespan_s: float) -> int:
    """Transfers from the end of this step's own to the beginning of the next layer's step."""
    transfer_s = cost.expert_transfer_s
    if not cost.has_gpu or transfer_s <= 0.0:
        return _MOST
    idle_s = makespan_s + cost.between_layers_s[1] - task.link_busy_s - found.link_s
    return max(0, min(_MOST, int(idle_s / transfer_s * (1.0 + 1e-9))))
