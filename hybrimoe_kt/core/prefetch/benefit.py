"""What prefetches were worth: which were used, which were wasted, and whether each kind of them pays."""

from __future__ import annotations

from hybrimoe_kt.core.layer_state import LayerState
from hybrimoe_kt.core.schedule.base import Assignment, Task
from hybrimoe_kt.core.schedule.scheduler import Scheduler
from hybrimoe_kt.core.stats import Stats

__all__ = ["Benefit", "Ledger"]


class Benefit:
    """Whether one kind of prefetch pays, by the predicted seconds it saved or cost in the plans it touched.

    On until touched plans lost time on average, by more than twice the standard error of that average; then off for
    `pause` layer steps and tried again, each time twice as long.
    """

    __slots__ = ("_left", "_pause", "is_on", "mean_s", "mean_square", "num_events")

    def __init__(self, pause: int = 512) -> None:
        self.is_on = True
        self.mean_s = 0.0
        self.mean_square = 0.0
        self.num_events = 0
        self._pause = pause
        self._left = 0

    def add(self, saved_s: float) -> None:
        """Book one plan's predicted seconds saved (negative: lost)."""
        self.num_events += 1
        count = min(self.num_events, 64)
        self.mean_s += (saved_s - self.mean_s) / count
        self.mean_square += (saved_s * saved_s - self.mean_square) / count
        variance = self.mean_square - self.mean_s * self.mean_s
        if self.num_events >= 32 and self.mean_s < 0.0 and self.mean_s * self.mean_s * count >= 4.0 * variance:
            self.is_on = False
            self._left, self._pause = self._pause, self._pause * 2
            self.num_events, self.mean_s, self.mean_square = 0, 0.0, 0.0

    def tick(self) -> None:
        """Count one layer step; ends a pause in time."""
        if not self.is_on:
            self._left -= 1
            self.is_on = self._left <= 0


class Ledger:
    """Books prefetches as they are started, used and lost."""

    def __init__(self, stats: Stats) -> None:
        self._stats = stats
        self.benefit = {"gate": Benefit(), "admission": Benefit()}
        """By kind of prefetch."""

    def started(self, state: LayerState) -> None:
        """A prefetch for `state`'s layer is on the link."""
        self._stats.num_prefetches += 1
        self._stats.prefetched_bytes += state.spec.expert_bytes
        self._stats.link_busy_s += state.cost.expert_transfer_s

    def aborted(self, state: LayerState) -> None:
        """One that the link had not begun is not made."""
        self._stats.num_aborted += 1
        self._stats.prefetched_bytes -= state.spec.expert_bytes
        self._stats.link_busy_s -= state.cost.expert_transfer_s

    def lost(self, state: LayerState, expert: int) -> None:
        """An expert has lost its slot; if it was prefetched and never used, that was for nothing."""
        if state.forget(expert):
            self._stats.wasted_prefetches += 1
            self._stats.wasted_bytes += state.spec.expert_bytes

    def credit(self, state: LayerState, task: Task, assignment: Assignment, scheduler: Scheduler) -> None:
        """Book what earlier prefetches did for this plan: its makespan against the one without them.

        An expert keeps earning as long as it keeps its slot; what it displaced costs once, as it may come back.
        """
        gained: dict[int, str] = {}
        lost: dict[int, str] = {}
        if state.prefetched or state.proven:
            num_first, gained = state.note_used(task.held)
            self._stats.useful_prefetches += num_first
        if state.displaced and task.missing:
            lost = state.note_missed(task.missing)
        if not gained and not lost:
            return
        kinds = {*gained.values(), *lost.values()}
        if len(kinds) != 1:
            return
        without = Task(
            task.cost,
            task.loads,
            ([e for e in task.held if e not in gained] if gained else task.held) + list(lost),
            ([e for e in task.missing if e not in lost] if lost else task.missing) + list(gained),
            0,
            {e: at_s for e, at_s in task.arrival_s.items() if e not in gained} if task.arrival_s else {},
            0.0,
            task.shared_s,
            max(0, task.num_free + len(gained) - len(lost)),
            task.load,
        )
        self.benefit[kinds.pop()].add(scheduler.makespan_s(without) - assignment.makespan_s)
