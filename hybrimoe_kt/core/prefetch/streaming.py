"""A prompt's next layer passes through lent slots while this one computes, and leaves none of them occupied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hybrimoe_kt.core.layer_state import LayerState
from hybrimoe_kt.core.schedule.base import Task
from hybrimoe_kt.core.schedule.scheduler import Scheduler
from hybrimoe_kt.core.stats import Stats
from hybrimoe_kt.core.types import Routing, Transfer

from .benefit import Ledger
from .prefetcher import GAINS, by_load

__all__ = ["Streaming"]


class Streaming:
    """Lends slots to layers, decides what to bring into them, and takes them back."""

    def __init__(self, layers: Mapping[int, LayerState], stats: Stats, ledger: Ledger) -> None:
        self._layers, self._stats, self._ledger = layers, stats, ledger
        self.ahead: tuple[int, int] | None = None
        """A layer whose prefetch lent slots, and the layer that got them."""

    def left_behind(self, layer: int) -> LayerState | None:
        """The layer whose slots were lent for a prompt that ended before its time, as `layer`'s step shows."""
        if self.ahead is None or layer in self.ahead:
            return None
        state = self._layers[self.ahead[1]]
        return state if state.is_streaming else None  # its slots may have been taken for good since

    def choose(self, layer: int, guess: Routing, scheduler: Scheduler, now_s: float, start_s: float) -> list[Transfer]:
        """Return what to bring for the layer after `layer`, which starts at `start_s`, beside what its cache holds.

        As many of the highest predicted loads as make its simulated makespan least; a quarter more each time it is
        tried, as every trial is a schedule of the whole layer. Returns nothing where the best is none.
        """
        state = self._layers[guess.layer]
        if not state.uses_gpu or not state.spec.num_buffer_slots:
            return []
        if state.is_streaming:
            self.ahead = layer, guess.layer
            return []
        task = state.task(guess.loads, guess.num_tokens, now_s, start_s)
        state.open_buffer()
        self.ahead = layer, guess.layer
        missing = by_load(guess, task.missing)[: state.spec.num_buffer_slots]
        best_s, best = scheduler.makespan_s(task) * GAINS, 0
        for quarter in range(1, 5):
            count = len(missing) * quarter // 4
            makespan_s = scheduler.makespan_s(_streamed(state, task, missing[:count], now_s, start_s))
            if makespan_s < best_s:
                best_s, best = makespan_s, count
        free = [slot for slot in state.cache.free_slots() if slot >= state.first_buffer_slot]
        result = []
        for expert, slot in zip(missing[:best], free, strict=False):
            result.append(state.prefetch(expert, slot, now_s, "stream"))
            self._ledger.started(state)
        self._stats.num_streamed += len(result)
        return result

    def close(self, state: LayerState) -> None:
        """The layer is through: what was streamed is gone, and what it had no use for was wasted."""
        if self.ahead is not None and self.ahead[1] == state.spec.layer:
            self.ahead = None
        for expert in state.close_buffer():
            self._ledger.lost(state, expert)


def _streamed(state: LayerState, task: Task, experts: Sequence[int], now_s: float, start_s: float) -> Task:
    """`task` with `experts` on their way, one after the other behind what the link has to do."""
    end_s = max(now_s, state.link.free_s)
    arrival_s = dict(task.arrival_s)
    for expert in experts:
        end_s += state.cost.expert_transfer_s
        if end_s > start_s:
            arrival_s[expert] = end_s - start_s
    gone = set(experts)
    return Task(
        task.cost,
        task.loads,
        [*task.held, *experts],
        [e for e in task.missing if e not in gone],
        layer=task.layer,
        arrival_s=arrival_s,
        link_busy_s=max(0.0, end_s - start_s),
        shared_s=task.shared_s,
        num_free=task.num_free,
    )
