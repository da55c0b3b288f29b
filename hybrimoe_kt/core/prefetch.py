"""Chooses transfers for later layers by predicted gain, fills idle link time, and stops when it does not pay."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from .cache import FREE
from .layer_state import LayerState
from .scheduler import Assignment, Scheduler, Task
from .stats import Stats
from .types import ExpertId, Plan, Routing, Transfer

_MAX_LOADS_TRIED = 3
_SAME = 1.0 - 1e-9  # a gain below rounding is none


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


class Prefetcher:
    """Ranks transfers for later layers; owns the decision, not the caches it books them in."""

    def __init__(
        self, layers: Mapping[int, LayerState], scheduler: Scheduler, stats: Stats, size: int, admission: bool
    ) -> None:
        self._layers, self.scheduler, self._stats, self._size = layers, scheduler, stats, size
        self._admission = admission
        self.benefit = {"gate": Benefit(), "admission": Benefit()}
        self._proven: dict[int, dict[int, str]] = {layer: {} for layer in layers}  # used once and still in their slots

    def choose(self, plan: Plan, predictions: Sequence[Routing], now_s: float, next_s: float) -> list[Transfer]:
        """Book and return up to `size` transfers while `plan` runs; `next_s` is when the next layer starts.

        For the very next layer a transfer may still be under way when it starts: the simulated gain counts the
        wait. Anything meant for a later one must land before that layer starts.
        """
        result: list[Transfer] = []
        for benefit in self.benefit.values():
            benefit.tick()
        if self.benefit["gate"].is_on:
            start_s = next_s
            if predictions:
                self._layers[predictions[0].layer].predicted = predictions[0].loads
            for ahead, routing in enumerate(predictions[: self._num_lacking(predictions)]):
                state = self._layers[routing.layer]
                if len(result) >= self._size:
                    break
                makespan_s = self._fill(state, routing, now_s, start_s, start_s if ahead else float("inf"), result)
                start_s += makespan_s + state.cost.between_layers_s(routing.num_tokens)
        if self._admission and self.benefit["admission"].is_on:
            self._admit(plan, now_s, next_s, result)
        return result

    def _num_lacking(self, predictions: Sequence[Routing]) -> int:
        """How many predictions there are up to the last of which an expert is missing."""
        for number in range(len(predictions), 0, -1):
            routing = predictions[number - 1]
            if not self._layers[routing.layer].has_all(routing.loads):
                return number
        return 0

    def stream(self, routing: Routing, now_s: float, start_s: float) -> list[Transfer]:
        """Book and return what to bring of the next layer of a prompt, at `start_s`, beside what its cache holds.

        As many of the highest predicted loads as make its simulated makespan least; a quarter more each time it is
        tried, as every trial is a schedule of the whole layer. Returns nothing where the best is none.
        """
        state = self._layers[routing.layer]
        if not state.uses_gpu or state.is_streaming:
            return []
        task = state.task(routing.loads, routing.num_tokens, now_s, start_s)
        state.open_stream()
        missing = _candidates(routing, task.missing)[: state.spec.num_stream_slots]
        best_s, best = self.scheduler.makespan_s(task) * _SAME, 0
        for quarter in range(1, 5):
            count = len(missing) * quarter // 4
            makespan_s = self.scheduler.makespan_s(self._streamed(state, task, missing[:count], now_s, start_s))
            if makespan_s < best_s:
                best_s, best = makespan_s, count
        result: list[Transfer] = []
        free = [
            slot for slot in state.cache.free_slots() if slot >= state.cache.num_slots - state.spec.num_stream_slots
        ]
        for expert, slot in zip(missing[:best], free, strict=False):
            self._book(state, expert, slot, now_s, "stream", result)
        self._stats.num_streamed += len(result)
        return result

    def _streamed(self, state: LayerState, task: Task, experts: Sequence[int], now_s: float, start_s: float) -> Task:
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

    def credit(self, state: LayerState, task: Task, assignment: Assignment) -> None:
        """Book what earlier prefetches did for this plan: its makespan against the one without them.

        An expert keeps earning as long as it keeps its slot; what it displaced costs once, as it may come back.
        """
        proven, prefetched, displaced = self._proven[state.spec.layer], state.prefetched, state.displaced
        if prefetched:
            first = {e: prefetched.pop(e) for e in task.held if e in prefetched}
            proven.update({e: kind for e, kind in first.items() if kind != "stream"})
            self._stats.useful_prefetches += len(first)
        gained = {e: proven[e] for e in task.held if e in proven}
        lost = {e: displaced.pop(e) for e in task.missing if e in displaced} if displaced and task.missing else {}
        if not gained and not lost:
            return
        kinds = {*gained.values(), *lost.values()}
        if len(kinds) != 1:
            return
        without = Task(
            task.cost,
            task.loads,
            [e for e in task.held if e not in gained] + list(lost),
            [e for e in task.missing if e not in lost] + list(gained),
            arrival_s={e: at_s for e, at_s in task.arrival_s.items() if e not in gained} if task.arrival_s else None,
            shared_s=task.shared_s,
            num_free=max(0, task.num_free + len(gained) - len(lost)),
        )
        self.benefit[kinds.pop()].add(self.scheduler.makespan_s(without) - assignment.makespan_s)

    def forget(self, expert: ExpertId) -> None:
        """Stop crediting `expert`: it has lost its slot."""
        self._proven[expert.layer].pop(expert.index, None)

    def has_proven(self, layer: int) -> bool:
        """Whether `layer` holds prefetched experts that were used before."""
        return bool(self._proven[layer])

    def _fill(
        self, state: LayerState, routing: Routing, now_s: float, start_s: float, by_s: float, result: list[Transfer]
    ) -> float:
        """Append the transfers that most lower one later layer's makespan; return that makespan."""
        if not state.uses_gpu:
            return state.cost.cpu_s(routing.loads.values())
        task = state.task(routing.loads, routing.num_tokens, now_s, start_s)
        makespan_s = self.scheduler.makespan_s(task)
        candidates = _candidates(routing, task.missing)
        while candidates and len(result) < self._size:
            end_s = max(now_s, state.link.free_s) + state.cost.expert_transfer_s
            if end_s > by_s:
                break
            best, best_s = -1, makespan_s * _SAME
            for expert in _one_per_load(candidates, routing.loads):
                after_s = self.scheduler.makespan_s(_with(task, expert, end_s - start_s))
                if after_s < best_s:
                    best, best_s = expert, after_s
            if best < 0 or not self._start(state, best, routing.loads, now_s, "gate", result):
                break
            candidates.remove(best)
            task, makespan_s = _with(task, best, end_s - start_s), best_s
        return makespan_s

    def _admit(self, plan: Plan, now_s: float, by_s: float, result: list[Transfer]) -> None:
        """Use what is left of the link's idle time to keep experts the CPU had to compute, if worth a slot."""
        state = self._layers[plan.layer]
        if not state.uses_gpu or state.is_streaming or len(result) >= self._size:
            return
        end_s = max(now_s, state.link.free_s) + state.cost.expert_transfer_s
        if end_s > by_s:
            return
        slot_of, value = state.cache.slot_of, state.policy.value
        candidates = sorted([e for e in plan.cpu if slot_of[e] == FREE], key=lambda e: (-value(e), e))
        for expert in candidates[: self._size - len(result)]:
            end_s = max(now_s, state.link.free_s) + state.cost.expert_transfer_s
            if end_s > by_s or not self._start(state, expert, (), now_s, "admission", result):
                return

    def _start(
        self,
        state: LayerState,
        expert: int,
        protected: Collection[int],
        now_s: float,
        kind: str,
        result: list[Transfer],
    ) -> bool:
        """Give `expert` a free slot or the policy's first victim's; False if none may go."""
        cache, spec = state.cache, state.spec
        free = cache.free_slots() if FREE in cache.occupant else []
        victim = FREE
        if not free:
            candidates = cache.evictable(protected)
            if not candidates:
                return False
            victim = state.policy.first(candidates)
            if kind == "admission" and not state.policy.admits(expert, victim):
                return False
        slot = free[0] if free else cache.slot_of[victim]
        if victim != FREE:
            # Without prefetching, an expert that prefetching brought would not be there to lose.
            if victim not in state.prefetched and victim not in self._proven[spec.layer]:
                state.displaced[victim] = kind
            self.forget(ExpertId(spec.layer, victim))
            if state.prefetched.pop(victim, None):
                self._stats.wasted_prefetches += 1
                self._stats.wasted_bytes += spec.expert_bytes
        self._book(state, expert, slot, now_s, kind, result)
        return True

    def _book(self, state: LayerState, expert: int, slot: int, now_s: float, kind: str, result: list[Transfer]) -> None:
        """Put the transfer of `expert` into `slot` on the link and in the books."""
        cache, spec = state.cache, state.spec
        old = cache.occupant[slot]
        evicted = ExpertId(spec.layer, old) if old != FREE else None
        transfer = Transfer(ExpertId(spec.layer, expert), slot, spec.expert_bytes, "prefetch", evicted)
        cache.prepare(expert, slot, state.link.add(transfer, now_s, state.cost.expert_transfer_s))
        state.displaced.pop(expert, None)
        state.prefetched[expert] = kind
        self._stats.num_prefetches += 1
        self._stats.prefetched_bytes += spec.expert_bytes
        self._stats.link_busy_s += state.cost.expert_transfer_s
        result.append(transfer)


def _candidates(routing: Routing, missing: Sequence[int]) -> list[int]:
    """Return `missing`, the highest load first, of equal loads the most probable."""
    loads, scores = routing.loads, routing.scores
    if scores is None:
        return sorted(missing, key=loads.__getitem__, reverse=True)
    return sorted(missing, key=lambda e: (-loads[e], -scores[e], e))


def _one_per_load(candidates: Sequence[int], loads: Mapping[int, int]) -> list[int]:
    """Return the first candidate of each of the highest loads: experts of one load gain the same."""
    first: dict[int, int] = {}
    for expert in candidates:
        first.setdefault(loads[expert], expert)
        if len(first) == _MAX_LOADS_TRIED:
            break
    return list(first.values())


def _with(task: Task, expert: int, arrival_s: float) -> Task:
    """Return `task` with `expert` on its way, landing `arrival_s` after the step starts."""
    held = [*task.held, expert]
    arrivals = {**task.arrival_s, expert: arrival_s} if arrival_s > 0 else task.arrival_s
    return Task(
        task.cost,
        task.loads,
        held,
        [e for e in task.missing if e != expert],
        layer=task.layer,
        arrival_s=arrivals,
        link_busy_s=max(task.link_busy_s, arrival_s),
        shared_s=task.shared_s,
        num_free=max(0, task.num_free - 1),
    )
