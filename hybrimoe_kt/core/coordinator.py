"""Decides for a whole model: one object that owns caches, scheduler, policies, prefetcher and counters.

What it decides is in what its methods return, and is all that a host has to do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from hybrimoe_kt.errors import ConfigError

from .allocation import allocate
from .cache import FREE
from .cost import CostModel
from .decision_table import DecisionTable
from .device_counts import DeviceCounts
from .device_rules import LayerTables
from .layer_state import LayerState
from .link import Link
from .prefetch.benefit import Ledger
from .prefetch.prefetcher import Prefetcher
from .prefetch.streaming import Streaming
from .schedule import Scheduler, make_scheduler
from .schedule.base import Assignment, Task, all_on_cpu, cpu_task
from .schedule.baselines import CpuOnlyScheduler, GpuOnlyScheduler
from .stats import Stats
from .strategy import Strategy
from .types import ExpertId, LayerSpec, Orders, Plan, Routing, Transfer, is_decode
from .whole_steps import CpuSteps, WholeSteps

_GUESSED = ("gate", "stream")
_CPU_ONLY, _GPU_ONLY = CpuOnlyScheduler(), GpuOnlyScheduler()
_NOTHING = Orders()


class _Open(NamedTuple):
    """A layer step between `plan` and `finish`."""

    plan: Plan
    routing: Routing
    task: Task


class _Unlearnt(NamedTuple):
    """A layer step that has been planned and not been learnt from."""

    state: LayerState
    routing: Routing
    is_decode: bool
    task: Task
    assignment: Assignment
    scheduler: Scheduler


class Coordinator:
    """Decides, per layer and step, what runs where, which experts stand in slots, and what to prefetch.

    It reads no clock: its virtual time advances by predicted seconds, so the same routings in the same order
    give the same decisions wherever it runs. Call order per layer: `plan`, then optionally `prefetch`, then
    `finish`; one plan is open at a time. Not thread-safe.
    """

    def __init__(
        self,
        layers: Sequence[LayerSpec],
        cost: CostModel | Mapping[int, CostModel],
        strategy: Strategy | None = None,
        *,
        frequencies: Mapping[int, Sequence[float]] | None = None,
    ) -> None:
        """`cost` is one model for all layers or one per layer; `frequencies` rank the experts to start with."""
        if not layers:
            raise ConfigError("no MoE layers given; a coordinator needs at least one LayerSpec")
        self.strategy = strategy = strategy or Strategy()
        self.stats = Stats()
        self.scheduler: Scheduler = strategy.make_scheduler()
        self.predictor = strategy.make_predictor(layers)
        self._usual = self.scheduler
        self._whole, self._on_cpu = WholeSteps(), CpuSteps()
        self._frequencies = frequencies or {}
        links = {spec.accelerator: Link() for spec in layers}
        self._layers: dict[int, LayerState] = {}
        for spec, policy in zip(layers, strategy.make_policies(layers), strict=True):
            model = cost if isinstance(cost, CostModel) else cost[spec.layer]
            self._layers[spec.layer] = LayerState(spec, model, policy, links[spec.accelerator])
        self._costs = {layer: state.cost for layer, state in self._layers.items()}
        self._ledger = Ledger(self.stats)
        self._prefetcher = Prefetcher(self._layers, self._ledger, strategy.prefetch_size, admits=strategy.admits)
        self._streaming = Streaming(self._layers, self.stats, self._ledger)
        self._uses_link = self._may_prefetch()
        self._open: _Open | None = None
        self._unlearnt: _Unlearnt | None = None
        self.now_s = 0.0
        self.revision = 0
        """Counts what may change whether a layer decides anything: sizes, failures, another scheduler or pace."""

    def use(self, scheduler: str | None) -> None:
        """Plan with another scheduler from now on, None for the one it was made with."""
        self.revision += 1
        self.scheduler = self._usual if scheduler is None else make_scheduler(scheduler, {})

    def set_pace(self, cpu: float, dense: float = 1.0, more_overhead_s: float = 0.0) -> None:
        """Predict with the CPU's experts, and what lies between layers, taking so many times what the profile says.

        Every step takes `more_overhead_s` on top of that.
        """
        self.revision += 1
        paced = {id(cost): cost.at_pace(cpu, dense, more_overhead_s) for cost in self._costs.values()}
        for layer, state in self._layers.items():
            state.cost = paced[id(self._costs[layer])]

    @property
    def reads_scores(self) -> bool:
        """Whether any decision looks at the scores of a layer's own routing; guesses come with theirs in any case."""
        return self.predictor.reads_scores or any(state.policy.reads_scores for state in self._layers.values())

    def cpu_share_s(self, layer: int, num_experts: int) -> float:
        """Predicted seconds of one token's share of so many experts on the CPU, the link being idle."""
        return self._layers[layer].cost.cpu_s([1] * num_experts)

    def between_layers_s(self, layer: int) -> float:
        """Predicted seconds from the end of `layer`'s decode step to the next layer's routing."""
        return self._layers[layer].cost.between_layers_s[1]

    def single_device_s(self, plan: Plan) -> tuple[float, float]:
        """Predicted seconds of an open plan's step on the CPU alone and on the GPU alone."""
        assert self._open is not None and self._open.plan is plan, "ask while the plan is open"
        task = self._open.task
        return _CPU_ONLY.assign(task).makespan_s, _GPU_ONLY.assign(task).makespan_s

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
        layer, loads, decodes = routing.layer, routing.loads, is_decode(routing.num_tokens, routing.phase)
        state = self._layers[layer]
        dropped: list[Transfer] = []
        closed: tuple[int, ...] = ()
        if self._streaming.ahead is not None and (left := self._streaming.left_behind(layer)) is not None:
            dropped, closed = self._close_buffer(left), (left.spec.layer,)
        if not state.uses_gpu:
            task = cpu_task(state.cost, loads)
            assignment = all_on_cpu(task)
        else:
            if self._uses_link and state.prefetched and state.link.free_s > self.now_s:
                dropped += self._abort_wrong(state, loads)
            if state.spec.num_buffer_slots and not decodes:
                state.open_buffer()  # if the layer before has not: on-demand transfers may pass through them
            task = state.task(loads, routing.num_tokens, self.now_s, self.now_s)
            assignment = self.scheduler.assign(task)
        self._unlearnt = _Unlearnt(state, routing, decodes, task, assignment, self.scheduler)
        if assignment.transfers:  # the policy chooses their slots
            self.learn()
        plan = self._commit(state, task, assignment, tuple(dropped), closed)
        self._open = _Open(plan, routing, task)
        return plan

    def learn(self) -> None:
        """Count the open plan and let ledger, policy and predictor hear of it, once; best with its work under way.

        `prefetch` and `finish` do it where nobody has.
        """
        if self._unlearnt is None:
            return
        state, routing, is_decode, task, assignment, scheduler = self._unlearnt
        self._unlearnt = None
        if state.uses_gpu:
            if state.prefetched or state.displaced or state.proven:
                self._ledger.credit(state, task, assignment, scheduler)
            state.policy.touch(routing)
        self._count(state, task, assignment, is_decode=is_decode)
        if self._uses_link and self.predictor.learns:
            self.predictor.observe(routing)

    def decides_nothing(self, layer: int, num_tokens: int) -> bool:
        """Whether a step of `layer` is its accelerator's whatever is routed: nothing need be read to plan it.

        So it is where every expert stands in a slot and the scheduler would leave none to the CPU. `pass_over` then
        takes the place of `plan` and `finish`.
        """
        state = self._layers[layer]
        if state.cache.num_slots < state.spec.num_experts:
            return False
        return state.is_whole and not self._whole.of(self.scheduler, state, num_tokens).cpu

    def slots_of(self, layer: int) -> Sequence[int]:
        """The slot of every expert of a layer."""
        return self._layers[layer].cache.slot_of

    def pass_over(self, layer: int, num_tokens: int) -> Sequence[int]:
        """Advance past a step that decided nothing; return the slot of every expert."""
        state = self._layers[layer]
        assignment = self._whole.of(self.scheduler, state, num_tokens)
        step_s = assignment.makespan_s + state.cost.step_overhead_s + state.cost.between_layers_s[num_tokens]
        self.now_s += step_s
        self.stats.elapsed_s += step_s
        self.stats.makespan_s += assignment.makespan_s + state.cost.step_overhead_s
        self.stats.gpu_busy_s += assignment.gpu_s
        self.stats.num_plans += 1
        return state.cache.slot_of

    def count_on_cpu(self, layer: int, loads: Mapping[int, int], num_tokens: int, *, is_decode: bool) -> float:
        """Advance past a step that is the CPU's whatever is routed; return its predicted seconds, as a plan's makespan.

        For machines where no layer has slots, or has any more: it takes the place of `plan` and `finish`, and counts
        what they count. `loads` and `is_decode` are as `Routing` has them.
        """
        state, stats, num_experts = self._layers[layer], self.stats, len(loads)
        assert not state.uses_gpu and self._open is None, "a layer that has slots is planned, one step after the other"
        assignment = self._on_cpu.of(state.cost, loads, num_tokens)
        makespan_s = assignment.makespan_s + state.cost.step_overhead_s
        step_s = makespan_s + state.cost.between_layers_s[num_tokens]
        stats.num_plans += 1
        stats.misses += num_experts
        stats.experts_on_cpu += num_experts
        stats.cpu_busy_s += assignment.cpu_s
        stats.makespan_s += makespan_s
        stats.elapsed_s += step_s
        self.now_s += step_s
        state.count([], list(loads), is_decode=is_decode)
        if state.predicted:
            self._count_predicted(state, loads)
        return makespan_s

    def note_hits(self, layer: int, counts: Sequence[int], last: Sequence[int]) -> None:
        """Count what steps that were passed over turned out to route to: hits by expert, and the last token's."""
        self._layers[layer].note_hits(counts, last)
        self.stats.hits += sum(counts)
        self.stats.experts_on_gpu += sum(counts)

    def prefetch(self, plan: Plan, predictions: Sequence[Routing] = ()) -> Orders:
        """Return what to start for later layers now; call it while `plan` is open, with its work under way.

        `predictions` are the host's guesses for the next layers in order, if it has any; predictors that
        learn on their own ignore them. None of their scores is kept.
        """
        if self._unlearnt is not None:
            self.learn()
        if not self._uses_link:
            return _NOTHING
        if isinstance(self.scheduler, CpuOnlyScheduler) and self.scheduler is not self._usual:
            return _NOTHING  # nothing would use it
        assert self._open is not None and self._open.plan is plan, "ask while the plan is open"
        routing, now_s = self._open.routing, self.now_s
        depth, predictor = self.strategy.prefetch_depth, self.predictor
        guesses = predictions[:depth] if predictor.passes_on else predictor.predict(routing, predictions, depth)
        dropped: list[Transfer] = []
        for guess in guesses:
            state = self._layers[guess.layer]
            if state.prefetched and state.link.free_s > now_s:
                dropped += self._abort_wrong(state, guess.loads)
        next_s = now_s + plan.makespan_s + self._layers[plan.layer].cost.between_layers_s[routing.num_tokens]
        streamed: list[Transfer] = []
        if guesses and self._layers[guesses[0].layer].spec.num_buffer_slots and not routing.is_decode:
            streamed = self._streaming.choose(plan.layer, guesses[0], self.scheduler, now_s, next_s)
        chosen = self._prefetcher.choose(plan, guesses, self.scheduler, now_s, next_s)
        return Orders((*streamed, *chosen), tuple(dropped)) if streamed or chosen or dropped else _NOTHING

    def finish(self, plan: Plan) -> Orders:
        """Unpin what `plan` used, complete its transfers and advance virtual time past it.

        A prompt's layer gives its lent slots back: the answer says so, and starts nothing.
        """
        assert self._open is not None and self._open.plan is plan, "a plan is finished once, before the next is made"
        if self._unlearnt is not None:
            self.learn()
        state, routing = self._layers[plan.layer], self._open.routing
        if plan.transfers:
            state.cache.unpin(set(plan.slots.values()))
            for transfer in plan.transfers:
                state.cache.complete(transfer.expert.index)
        elif plan.slots:
            state.cache.unpin(plan.slots.values())
        step_s = plan.makespan_s + state.cost.between_layers_s[routing.num_tokens]
        orders = _NOTHING
        if state.is_streaming:
            orders = Orders((), tuple(self._close_buffer(state)), (plan.layer,))
        self.now_s += step_s
        self.stats.elapsed_s += step_s
        self._open = None
        return orders

    def fail(self, transfer: Transfer) -> None:
        """Take back a transfer that did not happen: its slot is FREE, nothing is half resident."""
        self.revision += 1
        state = self._layers[transfer.expert.layer]
        if state.cache.slot_of[transfer.expert.index] == transfer.slot:
            state.cache.release(transfer.expert.index)
        state.forget(transfer.expert.index)
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
        assert not state.cache.num_pins, f"layer {layer} has a plan open"
        self.revision += 1
        for slot in range(state.cache.num_slots):
            self.drop(layer, slot)
        state.resize(num_slots)
        self._uses_link = self._may_prefetch()

    def layers(self) -> list[tuple[LayerSpec, CostModel]]:
        """Every layer, in order, with the costs that it is planned with now."""
        return [(state.spec, state.cost) for state in self._layers.values()]

    def hand_over(self, layer: int) -> LayerTables:
        """The layer's slots and what its experts are worth, for a device to plan with; no copy is under way any more.

        ConfigError for a policy that devices do not have. Nothing may be planned here until `take_back`.
        """
        state = self._layers[layer]
        assert not state.cache.num_pins, f"layer {layer} has a plan open"
        tables = LayerTables.empty(state.spec.num_experts, state.cache.num_slots)
        tables.slot_of[:], tables.expert_of[:] = state.cache.slot_of, state.cache.occupant
        tables.scores[:], tables.clock = state.policy.standing(), state.policy.clock
        return tables

    def take_back(self, layer: int, tables: LayerTables) -> None:
        """Plan with what a device has left behind; no copy is under way any more."""
        state = self._layers[layer]
        state.adopt(tables.expert_of)
        state.policy.resume(tables.scores, tables.clock)

    def note_planned(self, layer: int, table: DecisionTable, counts: DeviceCounts) -> None:
        """Add what a device has counted of steps that it planned by `table`, and let their predicted time pass."""
        self.now_s += counts.add_to(self.stats, self._layers[layer], table)

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

    def _may_prefetch(self) -> bool:
        return self.strategy.prefetch_size > 0 and any(state.uses_gpu for state in self._layers.values())

    def _close_buffer(self, state: LayerState) -> list[Transfer]:
        """Take lent slots back; return the prefetches into them that need not be made."""
        arrival_s, occupant = state.cache.arrival_s, state.cache.occupant
        arriving = [expert for expert in occupant[state.first_buffer_slot :] if expert in arrival_s]
        dropped = self._prefetcher.abort(state, arriving, self.now_s)
        self._streaming.close(state)
        return dropped

    def _abort_wrong(self, state: LayerState, loads: Mapping[int, int]) -> list[Transfer]:
        """Give up the prefetches of guessed experts that are not among `loads` after all."""
        wrong = [expert for expert, why in state.prefetched.items() if why in _GUESSED and expert not in loads]
        return self._prefetcher.abort(state, wrong, self.now_s) if wrong else []

    def _commit(
        self,
        state: LayerState,
        task: Task,
        assignment: Assignment,
        dropped: tuple[Transfer, ...],
        closed: tuple[int, ...],
    ) -> Plan:
        """Give transfers their slots and pin; the only place where a plan changes a cache."""
        slots: dict[int, int] = {}
        transfers: tuple[Transfer, ...] = ()
        gpu = assignment.gpu
        if gpu:
            if assignment.transfers:
                made, slots = allocate(state, task, assignment, self.now_s)
                transfers = tuple(made)
                for transfer in made:
                    if transfer.evicted is not None:
                        self._ledger.lost(state, transfer.evicted.index)
                state.cache.pin(set(slots.values()))
            else:
                slots = dict(zip(gpu, map(state.cache.slot_of.__getitem__, gpu), strict=True))
                state.cache.pin(slots.values())
        return Plan(
            state.spec.layer,
            tuple(assignment.cpu),
            tuple(gpu),
            transfers,
            slots,
            assignment.makespan_s + state.cost.step_overhead_s,
            assignment.cpu_s,
            len(task.held) - len(task.arrival_s),
            dropped,
            closed,
        )

    def _count(self, state: LayerState, task: Task, assignment: Assignment, *, is_decode: bool) -> None:
        stats, ready, absent = self.stats, task.held, task.missing
        stats.num_plans += 1
        stats.misses += len(absent)
        if task.arrival_s:  # by expert, one still on its way is a miss
            stats.pending += len(task.arrival_s)
            ready = [e for e in ready if e not in task.arrival_s]
            absent = [*absent, *task.arrival_s]
        stats.hits += len(ready)
        state.count(ready, absent, is_decode=is_decode)
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
            self._count_predicted(state, task.loads)

    def _count_predicted(self, state: LayerState, loads: Mapping[int, int]) -> None:
        """Count how right was what had been predicted for a layer whose step has `loads`."""
        stats = self.stats
        stats.predicted += len(state.predicted)
        stats.predicted_right += len(loads.keys() & state.predicted)
        stats.predicted_routed += len(loads)
        state.predicted = ()
