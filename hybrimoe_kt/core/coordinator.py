"""The only door hosts use: one object per model that owns caches, scheduler, policies, prefetcher and counters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hybrimoe_kt.errors import ConfigError

from .allocation import allocate
from .cache import FREE
from .cost import CostModel
from .layer_state import LayerState
from .link import Link
from .policies import make_policies
from .predictors import Predictor, make_predictor
from .prefetch import Prefetcher
from .scheduler import Assignment, CpuOnlyScheduler, GpuOnlyScheduler, Scheduler, Task, all_on_cpu
from .schedulers import make_scheduler
from .stats import Stats
from .types import ExpertId, LayerSpec, Plan, Routing, Transfer
from .whole_steps import WholeSteps

_GUESSED = ("gate", "stream")
_CPU_ONLY, _GPU_ONLY = CpuOnlyScheduler(), GpuOnlyScheduler()


class Coordinator:
    """Decides, per layer and step, what runs where, which experts stand in slots, and what to prefetch.

    It reads no clock: its virtual time advances by predicted seconds, so the same routings in the same order
    give the same decisions wherever it runs. Call order per layer: `plan`, then optionally `prefetch`, then
    `finish`; one open plan per layer. Not thread-safe.
    """

    def __init__(
        self,
        layers: Sequence[LayerSpec],
        cost: CostModel | Mapping[int, CostModel],
        *,
        scheduler: str = "balanced",
        scheduler_options: Mapping[str, Any] | None = None,
        policy: str = "adaptive",
        policy_options: Mapping[str, Any] | None = None,
        predictor: str = "stale_gate",
        predictor_options: Mapping[str, Any] | None = None,
        prefetch_size: int = 1,
        prefetch_depth: int = 1,
        admission: bool | None = None,
        frequencies: Mapping[int, Sequence[float]] | None = None,
    ) -> None:
        """`cost` is one model for all layers or one per layer; `frequencies` rank the experts to start with.

        At most `prefetch_size` transfers start per layer (0: none), for the next `prefetch_depth` layers.
        With `admission` what the link's idle time has left brings experts the CPU just computed, for later
        tokens; by default only under the `balanced` scheduler, as no published method does it.
        """
        if not layers:
            raise ConfigError("no MoE layers given; a coordinator needs at least one LayerSpec")
        _check_counts(prefetch_size, prefetch_depth)
        self.stats = Stats()
        self.scheduler: Scheduler = make_scheduler(scheduler, scheduler_options or {})
        self.predictor: Predictor = make_predictor(predictor, layers, predictor_options or {})
        self.prefetch_size, self.prefetch_depth = prefetch_size, prefetch_depth
        self._usual = self.scheduler
        self._task: Task | None = None
        self._whole = WholeSteps()
        self._frequencies = frequencies or {}
        links = {spec.accelerator: Link() for spec in layers}
        self._layers: dict[int, LayerState] = {}
        for spec, policy_of_layer in zip(layers, make_policies(policy, layers, policy_options or {}), strict=True):
            model = cost if isinstance(cost, CostModel) else cost[spec.layer]
            self._layers[spec.layer] = LayerState(spec, model, policy_of_layer, links[spec.accelerator])
        self._costs = {layer: state.cost for layer, state in self._layers.items()}
        for state in self._layers.values():
            state.admission_value_s = self._admission_value_s(state)
        admits = scheduler == "balanced" if admission is None else admission
        self._prefetcher = Prefetcher(self._layers, self.scheduler, self.stats, prefetch_size, admits)
        self._uses_link = prefetch_size > 0 and any(state.uses_gpu for state in self._layers.values())
        self._open: tuple[Routing, Plan] | None = None
        self._aborted: list[Transfer] = []
        self._stream: tuple[int, int] | None = None  # a layer whose prefetch lent slots, and the layer that got them
        self._closed: list[int] = []
        self.now_s = 0.0
        self.cpu_s = 0.0
        """Predicted end of the last plan's CPU share, seconds after its start."""

    def use(self, scheduler: str | None) -> None:
        """Plan with another scheduler from now on, None for the one it was made with."""
        self.scheduler = self._usual if scheduler is None else make_scheduler(scheduler, {})
        self._prefetcher.scheduler = self.scheduler

    def set_pace(self, cpu: float, dense: float = 1.0) -> None:
        """Predict with the CPU's experts, and what lies between layers, taking so many times what the profile says."""
        paced = {id(cost): cost.at_pace(cpu, dense) for cost in self._costs.values()}
        for layer, state in self._layers.items():
            state.cost = paced[id(self._costs[layer])]
            state.admission_value_s = self._admission_value_s(state)

    def _admission_value_s(self, state: LayerState) -> float:
        future_hits: float = self._usual.option.get("future_hits", 0.0)
        return future_hits * state.hit_s()

    def between_layers_s(self, layer: int) -> float:
        """Predicted seconds from the end of `layer`'s decode step to the next layer's routing."""
        return self._layers[layer].cost.between_layers_s(1)

    def single_device_s(self) -> tuple[float, float]:
        """Predicted seconds of the last plan's step on the CPU alone and on the GPU alone."""
        assert self._task is not None, "a plan was made"
        return _CPU_ONLY.assign(self._task).makespan_s, _GPU_ONLY.assign(self._task).makespan_s

    def initial_transfers(self) -> tuple[Transfer, ...]:
        """Fill every free slot before serving, most frequent experts first (else lowest indices); READY at once."""
        result = []
        for layer, state in self._layers.items():
            order = list(range(state.spec.num_experts))
            if layer in self._frequencies:
                counts = self._frequencies[layer]
                order.sort(key=[-count for count in counts].__getitem__)
            absent = [e for e in order if state.cache.slot_of[e] == FREE]
            for slot, expert in zip(state.cache.free_slots(), absent, strict=False):
                state.cache.prepare(expert, slot, self.now_s)
                state.cache.complete(expert)
                result.append(Transfer(ExpertId(layer, expert), slot, state.spec.expert_bytes, "prefetch"))
        return tuple(result)

    def plan(self, routing: Routing) -> Plan:
        """Decide one layer step; pins what the plan uses until `finish`."""
        state = self._layers[routing.layer]
        loads = routing.loads
        if self._stream is not None and routing.layer not in self._stream:
            self._close_stream(self._layers[self._stream[1]])  # the prompt it was for has ended before its time
        if not state.uses_gpu:
            task = Task(state.cost, loads, [], list(loads), num_free=0)
            assignment = all_on_cpu(task)
        else:
            if self._uses_link and state.prefetched:
                self._abort(state, [e for e, kind in state.prefetched.items() if kind in _GUESSED and e not in loads])
            if state.spec.num_stream_slots and routing.num_tokens > 1:
                state.open_stream()  # if the layer before has not: what arrives on demand may pass through them
            task = state.task(loads, routing.num_tokens, self.now_s, self.now_s)
            assignment = self.scheduler.assign(task)
            if state.prefetched or state.displaced or self._prefetcher.has_proven(routing.layer):
                self._prefetcher.credit(state, task, assignment)
            state.policy.touch(routing)
        self._task = task
        plan = self._commit(state, routing, task, assignment)
        if self._uses_link:
            self.predictor.observe(routing)
        self._open = (routing, plan)
        return plan

    def decides_nothing(self, layer: int, num_tokens: int) -> bool:
        """Whether a step of `layer` is its accelerator's whatever is routed: nothing need be read to plan it.

        So it is where every expert stands in a slot and the scheduler would leave none to the CPU. `pass_over` then
        takes the place of `plan` and `finish`.
        """
        state = self._layers[layer]
        return state.is_whole and not self._whole.of(self.scheduler, state, num_tokens).cpu

    def pass_over(self, layer: int, num_tokens: int) -> Sequence[int]:
        """Advance past a step that decided nothing; return the slot of every expert."""
        state = self._layers[layer]
        assignment = self._whole.of(self.scheduler, state, num_tokens)
        step_s = assignment.makespan_s + state.cost.step_overhead_s + state.cost.between_layers_s(num_tokens)
        self.now_s += step_s
        self.stats.elapsed_s += step_s
        self.stats.makespan_s += assignment.makespan_s + state.cost.step_overhead_s
        self.stats.gpu_busy_s += assignment.gpu_s
        self.stats.num_plans += 1
        return state.cache.slot_of

    def note_hits(self, layer: int, counts: Sequence[int], last: Sequence[int]) -> None:
        """Count what steps that were passed over turned out to route to: hits by expert, and the last token's."""
        self._layers[layer].note_hits(counts, last)
        self.stats.hits += sum(counts)
        self.stats.experts_on_gpu += sum(counts)

    def prefetch(self, layer: int, predictions: Sequence[Routing] = ()) -> tuple[Transfer, ...]:
        """Return the transfers to start now, in link order; call it while `layer`'s plan is open.

        `predictions` are the host's guesses for the next layers in order, if it has any; predictors that
        learn on their own ignore them. A transfer may be for this very layer: an admission for later tokens.
        """
        if not self._uses_link or self._open is None or self._open[1].layer != layer:
            return ()
        if isinstance(self.scheduler, CpuOnlyScheduler) and self.scheduler is not self._usual:
            return ()  # nothing would use it
        routing, plan = self._open
        guesses = self.predictor.predict(routing, predictions, self.prefetch_depth)
        for guess in guesses:
            state = self._layers[guess.layer]
            if state.prefetched:
                wrong = [e for e, kind in state.prefetched.items() if kind in _GUESSED and e not in guess.loads]
                self._abort(state, wrong)
        next_s = self.now_s + self._step_s(plan, routing.num_tokens)
        streamed: list[Transfer] = []
        if routing.num_tokens > 1 and guesses and self._layers[guesses[0].layer].spec.num_stream_slots:
            streamed = self._prefetcher.stream(guesses[0], self.now_s, next_s)
            if self._layers[guesses[0].layer].is_streaming:
                self._stream = layer, guesses[0].layer
        return (*streamed, *self._prefetcher.choose(plan, guesses, self.now_s, next_s))

    def take_aborted(self) -> tuple[Transfer, ...]:
        """Return, once, the prefetches handed out earlier that need not be made any more, oldest first.

        Skipping them is a permission, not a duty: the slot is free again, and whatever is put there next
        comes later on the same link. Ask after `plan` and after `prefetch`.
        """
        aborted, self._aborted = tuple(self._aborted), []
        return aborted

    def take_closed(self) -> tuple[int, ...]:
        """Return, once, the layers whose lent slots have been taken back. Ask after `plan` and after `finish`.

        Nothing may be sent into those slots any more.
        """
        closed, self._closed = tuple(self._closed), []
        return closed

    def finish(self, plan: Plan) -> None:
        """Unpin what `plan` used, complete its transfers and advance virtual time past it."""
        state = self._layers[plan.layer]
        if plan.slots:
            pins = state.cache.pins
            for slot in set(plan.slots.values()):
                assert pins[slot] > 0, f"layer {plan.layer}: slot {slot} is not pinned; was the plan finished before?"
                pins[slot] -= 1
            for transfer in plan.transfers:
                state.cache.complete(transfer.expert.index)
        if state.is_streaming:
            self._close_stream(state)
        step_s = self._step_s(plan, state.num_tokens)
        self.now_s += step_s
        self.stats.elapsed_s += step_s
        self._open = None

    def fail(self, transfer: Transfer) -> None:
        """Take back a transfer that did not happen: its slot is FREE, nothing is half resident."""
        state = self._layers[transfer.expert.layer]
        if state.cache.slot_of[transfer.expert.index] == transfer.slot:
            state.cache.release(transfer.expert.index)
        state.prefetched.pop(transfer.expert.index, None)
        self._prefetcher.forget(transfer.expert)
        self.stats.num_failed += 1

    def drop(self, layer: int, slot: int) -> None:
        """Free `slot`, whatever it holds: its bytes cannot be trusted. Call it with no plan open that uses it."""
        cache = self._layers[layer].cache
        expert = cache.occupant[slot] if slot < cache.num_slots else FREE  # lent slots may have been taken back
        if expert != FREE:
            self.fail(Transfer(ExpertId(layer, expert), slot, 0))

    def resize(self, layer: int, num_slots: int) -> None:
        """Give `layer` that many slots, all FREE, from the next plan on; 0 leaves its experts to the CPU."""
        state = self._layers[layer]
        assert not any(state.cache.pins), f"layer {layer} has a plan open"
        for slot in range(state.cache.num_slots):
            self.drop(layer, slot)
        state.displaced.clear()
        state.resize(num_slots)
        self._uses_link = self.prefetch_size > 0 and any(state.uses_gpu for state in self._layers.values())

    def heat(self) -> dict[str, list[list[int]]]:
        """Hits and misses of every expert since the start, `[num_layers, num_experts]`."""
        layers = self._layers.values()
        return {"hits": [list(state.hits) for state in layers], "misses": [list(state.misses) for state in layers]}

    def last_token(self) -> dict[str, list[list[int]]]:
        """The experts that the last token decoded on its own found ready, and did not, by layer."""
        layers = self._layers.values()
        return {
            "hits": [list(state.last_hits) for state in layers],
            "misses": [list(state.last_misses) for state in layers],
        }

    def check_integrity(self) -> None:
        """Assert that every layer's cache is consistent and, with no plan open, that no pin has leaked."""
        for layer, state in self._layers.items():
            state.cache.check_integrity()
            assert self._open is not None or not any(state.cache.pins), f"layer {layer} has pins and no open plan"

    def _close_stream(self, state: LayerState) -> None:
        """The layer is through: its streamed experts are gone, and those it had no use for were wasted."""
        layer = state.spec.layer
        self._closed.append(layer)
        if self._stream is not None and self._stream[1] == layer:
            self._stream = None
        waiting = [
            e
            for e, slot in enumerate(state.cache.slot_of)
            if slot >= state.cache.num_slots - state.spec.num_stream_slots
        ]
        self._abort(state, [e for e in waiting if e in state.cache.arrival_s])
        wasted = state.close_stream()
        self.stats.wasted_prefetches += len(wasted)
        self.stats.wasted_bytes += len(wasted) * state.spec.expert_bytes
        for expert in waiting:
            self._prefetcher.forget(ExpertId(layer, expert))

    def _step_s(self, plan: Plan, num_tokens: int) -> float:
        return plan.makespan_s + self._layers[plan.layer].cost.between_layers_s(num_tokens)

    def _abort(self, state: LayerState, unwanted: Sequence[int]) -> None:
        """Drop those prefetches for `state`'s layer that the link has not started."""
        if not unwanted or state.link.free_s <= self.now_s:
            return
        layer, gone = state.spec.layer, set(unwanted)
        dropped, moved = state.link.abort(self.now_s, lambda t: t.expert.layer == layer and t.expert.index in gone)
        for transfer in dropped:
            state.cache.release(transfer.expert.index)
            state.prefetched.pop(transfer.expert.index, None)
            self.stats.num_aborted += 1
            self.stats.prefetched_bytes -= transfer.num_bytes
            self.stats.link_busy_s -= state.cost.expert_transfer_s
        for entry in moved:
            arrival_s = self._layers[entry.transfer.expert.layer].cache.arrival_s
            if entry.transfer.expert.index in arrival_s:
                arrival_s[entry.transfer.expert.index] = entry.end_s
        self._aborted += dropped

    def _commit(self, state: LayerState, routing: Routing, task: Task, assignment: Assignment) -> Plan:
        """Give transfers their slots, pin and count; the only place where a plan changes anything."""
        slots: dict[int, int] = {}
        transfers: tuple[Transfer, ...] = ()
        gpu = assignment.gpu
        if gpu:
            if assignment.transfers:
                made, slots = allocate(state, task, assignment, self.now_s)
                transfers = tuple(made)
                self._book_evictions(state, made)
            else:
                slot_of = state.cache.slot_of
                slots = {e: slot_of[e] for e in gpu}
            used = set(slots.values())
            pins = state.cache.pins
            for slot in used:
                pins[slot] += 1
        num_hits = len(task.held) - len(task.arrival_s)
        state.num_tokens = routing.num_tokens
        self._count(state, task, assignment, num_hits)
        makespan_s = assignment.makespan_s + state.cost.step_overhead_s
        self.cpu_s = assignment.cpu_s
        return Plan(routing.layer, tuple(assignment.cpu), tuple(gpu), transfers, slots, makespan_s, num_hits)

    def _book_evictions(self, state: LayerState, transfers: Sequence[Transfer]) -> None:
        """Stop crediting prefetched experts that lost their slots; those never used were wasted."""
        for transfer in transfers:
            if transfer.evicted is not None:
                self._prefetcher.forget(transfer.evicted)
                if state.prefetched.pop(transfer.evicted.index, None):
                    self.stats.wasted_prefetches += 1
                    self.stats.wasted_bytes += transfer.num_bytes

    def _count(self, state: LayerState, task: Task, assignment: Assignment, num_hits: int) -> None:
        stats = self.stats
        stats.num_plans += 1
        stats.hits += num_hits
        stats.pending += len(task.arrival_s)
        stats.misses += len(task.missing)
        state.count(task, state.num_tokens)
        stats.experts_on_cpu += len(assignment.cpu)
        stats.experts_on_gpu += len(assignment.gpu)
        stats.cpu_busy_s += assignment.cpu_s
        stats.gpu_busy_s += assignment.gpu_s
        stats.link_busy_s += assignment.link_s
        stats.makespan_s += assignment.makespan_s + state.cost.step_overhead_s
        num_transfers = len(assignment.transfers)
        if num_transfers:
            stats.num_transfers += num_transfers
            stats.transferred_bytes += num_transfers * state.spec.expert_bytes
        if state.predicted:
            stats.predicted += len(state.predicted)
            stats.predicted_right += sum([e in state.predicted for e in task.loads])
            stats.predicted_routed += len(task.loads)
            state.predicted = ()


def _check_counts(prefetch_size: int, prefetch_depth: int) -> None:
    if prefetch_size < 0:
        raise ConfigError(f"prefetch_size is {prefetch_size}; give the transfers to start per layer, 0 for none")
    if not 1 <= prefetch_depth <= 3:
        raise ConfigError(f"prefetch_depth is {prefetch_depth}; it must be 1, 2 or 3 layers")
