"""The only door hosts use: one object per model that owns caches, scheduler, policies, prefetcher and counters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hybrimoe_kt.core.cache import FREE, ExpertCache
from hybrimoe_kt.core.cost import CostModel
from hybrimoe_kt.core.policies import Policy, make_policies
from hybrimoe_kt.core.scheduler import Assignment, Scheduler, Task, all_on_cpu
from hybrimoe_kt.core.schedulers import make_scheduler
from hybrimoe_kt.core.stats import Stats
from hybrimoe_kt.core.types import ExpertId, LayerSpec, Plan, Residency, Routing, Transfer
from hybrimoe_kt.errors import ConfigError


class LayerState:
    """What the coordinator keeps per layer."""

    __slots__ = ("cache", "cost", "policy", "prefetched", "spec", "uses_gpu")

    def __init__(self, spec: LayerSpec, cost: CostModel, policy: Policy) -> None:
        self.spec = spec
        self.cost = cost
        self.policy = policy
        self.uses_gpu = cost.has_gpu and spec.gpu_supported and spec.num_slots > 0
        self.cache = ExpertCache(spec.num_experts, spec.num_slots if self.uses_gpu else 0)
        self.prefetched: set[int] = set()


class Coordinator:
    """Decides, per layer and step, what runs where, which experts stand in slots, and what to prefetch.

    It reads no clock: its virtual time advances by predicted seconds, so the same routings in the same order
    give the same decisions wherever it runs. Call order per layer: `plan`, then optionally `prefetch`, then
    `finish`. Not thread-safe.
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
        prefetch_size: int = 1,
        prefetch_depth: int = 1,
        frequencies: Mapping[int, Sequence[float]] | None = None,
    ) -> None:
        """`cost` is one model for all layers or one per layer; `frequencies` rank the experts to start with."""
        if not layers:
            raise ConfigError("no MoE layers given; a coordinator needs at least one LayerSpec")
        self.scheduler: Scheduler = make_scheduler(scheduler, scheduler_options or {})
        self.stats = Stats()
        self.prefetch_size, self.prefetch_depth = prefetch_size, prefetch_depth
        self._frequencies = frequencies or {}
        self._layers: dict[int, LayerState] = {}
        for spec, layer_policy in zip(layers, make_policies(policy, layers, policy_options or {}), strict=True):
            model = cost if isinstance(cost, CostModel) else cost[spec.layer]
            self._layers[spec.layer] = LayerState(spec, model, layer_policy)
        self.now_s = 0.0
        self._link_free_s = {spec.accelerator: 0.0 for spec in layers}
        self._plan_end_s = 0.0
        self._num_tokens = 1

    def initial_transfers(self) -> tuple[Transfer, ...]:
        """Fill every free slot before serving, most frequent experts first (else lowest indices); READY at once."""
        result = []
        for layer, state in self._layers.items():
            order: Sequence[int] = range(state.spec.num_experts)
            if layer in self._frequencies:
                counts = self._frequencies[layer]
                order = sorted(order, key=lambda e: (-counts[e], e))
            absent = [e for e in order if state.cache.slot_of[e] == FREE]
            for slot, expert in zip(state.cache.free_slots(), absent, strict=False):
                state.cache.prepare(expert, slot, self.now_s)
                state.cache.complete(expert)
                result.append(Transfer(ExpertId(layer, expert), slot, state.spec.expert_bytes, "prefetch"))
        return tuple(result)

    def plan(self, routing: Routing) -> Plan:
        """Decide one layer step; pins what the plan uses until `finish`."""
        state = self._layers[routing.layer]
        if not state.uses_gpu:
            return self._plan_on_cpu(state, routing)
        task = self._task(state, routing.loads, routing.num_tokens, self.now_s)
        assignment = self.scheduler.assign(task)
        return self._commit(state, routing, task, assignment)

    def prefetch(self, layer: int, predictions: Sequence[Routing]) -> tuple[Transfer, ...]:
        """Return the transfers to start now, in link order, for the layers `predictions` are about."""
        if self.prefetch_size <= 0:
            return ()
        result: list[Transfer] = []
        for routing in predictions[: self.prefetch_depth]:
            self._prefetch_layer(routing, result)
            if len(result) >= self.prefetch_size:
                break
        return tuple(result)

    def finish(self, plan: Plan) -> None:
        """Unpin what `plan` used, complete its transfers and advance virtual time past it."""
        state = self._layers[plan.layer]
        cache = state.cache
        for slot in set(plan.slots.values()):
            cache.unpin(slot)
        for transfer in plan.transfers:
            cache.complete(transfer.expert.index)
        step_s = plan.makespan_s + state.cost.between_layers_s(self._num_tokens)
        self.now_s += step_s
        self.stats.elapsed_s += step_s

    def fail(self, transfer: Transfer) -> None:
        """Take back a transfer that did not happen: its slot is FREE, nothing is half resident."""
        state = self._layers[transfer.expert.layer]
        if state.cache.slot_of[transfer.expert.index] == transfer.slot:
            state.cache.release(transfer.expert.index)
        state.prefetched.discard(transfer.expert.index)
        self.stats.num_failed += 1

    def residency(self, layer: int) -> Residency:
        """Return where `layer`'s experts are now."""
        state = self._layers[layer]
        cache = state.cache
        cache.settle(self.now_s)
        return Residency(
            layer,
            frozenset(e for e in cache.occupant if e != FREE and e not in cache.arrival_s),
            {e: at_s - self.now_s for e, at_s in cache.arrival_s.items()},
            len(cache.free_slots()),
            max(0.0, self._link_free_s[state.spec.accelerator] - self.now_s),
        )

    def check_integrity(self) -> None:
        """Assert every layer's cache is consistent; call it when no plan is open to also rule out leaked pins."""
        for state in self._layers.values():
            state.cache.check_integrity()

    def _task(self, state: LayerState, loads: Mapping[int, int], num_tokens: int, now_s: float) -> Task:
        """Look residency up and describe the layer step to the scheduler."""
        cache = state.cache
        slot_of = cache.slot_of
        if cache.arrival_s:
            cache.settle(now_s)
        held = [e for e in loads if slot_of[e] >= 0]
        missing = [e for e in loads if slot_of[e] < 0]
        arrival_s = {e: cache.arrival_s[e] - now_s for e in held if e in cache.arrival_s} if cache.arrival_s else None
        num_loading = len(cache.arrival_s) - (len(arrival_s) if arrival_s else 0)
        return Task(
            state.cost,
            loads,
            held,
            missing,
            layer=state.spec.layer,
            arrival_s=arrival_s,
            link_busy_s=max(0.0, self._link_free_s[state.spec.accelerator] - now_s),
            shared_s=state.cost.shared_s(num_tokens),
            num_free=cache.num_slots - len(held) - num_loading,
        )

    def _plan_on_cpu(self, state: LayerState, routing: Routing) -> Plan:
        task = Task(state.cost, routing.loads, [], list(routing.loads), num_free=0)
        return self._commit(state, routing, task, all_on_cpu(task))

    def _commit(self, state: LayerState, routing: Routing, task: Task, assignment: Assignment) -> Plan:
        """Give transfers their slots, pin, tell the policy, count; the only place a plan changes anything."""
        slots: dict[int, int] = {}
        transfers: tuple[Transfer, ...] = ()
        gpu = assignment.gpu
        if gpu:
            cache = state.cache
            if assignment.transfers:
                transfers = self._allocate(state, task, assignment, slots)
            else:
                slot_of = cache.slot_of
                slots = {e: slot_of[e] for e in gpu}
            pins = cache.pins
            for slot in set(slots.values()):
                pins[slot] += 1
        num_hits = len(task.held) - len(task.arrival_s)
        if state.uses_gpu:
            state.policy.touch(routing)
        self._count(state, task, assignment, num_hits)
        self._num_tokens = routing.num_tokens
        self._plan_end_s = self.now_s + assignment.makespan_s
        return Plan(routing.layer, tuple(assignment.cpu), tuple(gpu), transfers, slots, assignment.makespan_s, num_hits)

    def _allocate(
        self, state: LayerState, task: Task, assignment: Assignment, slots: dict[int, int]
    ) -> tuple[Transfer, ...]:
        """Choose a slot per transfer: free ones, then the policy's victims outside the plan, then slots whose
        expert the plan is through with: the least valuable of those the link need not wait for, else the next to
        leave the GPU. Times are those of `evaluate`. Fills `slots` for every expert in `assignment.gpu`.
        """
        cache, cost, layer, num_bytes = state.cache, state.cost, state.spec.layer, state.spec.expert_bytes
        accelerator = state.spec.accelerator
        arriving = set(assignment.transfers)
        in_use = {e for e in assignment.gpu if e not in arriving}
        num = len(arriving)
        ready = cache.free_slots()[:num]
        if len(ready) < num:
            victims = state.policy.rank(cache.evictable(in_use))
            ready += [cache.slot_of[e] for e in victims[: num - len(ready)]]
        ready.reverse()
        used: list[tuple[float, float, int]] = []  # (left the GPU, value, slot) of experts the plan is through with
        link_s = max(self.now_s, self._link_free_s[accelerator])
        gpu_end_s = self.now_s + task.shared_s
        result = []
        for expert in assignment.gpu:
            if expert in arriving:
                if ready:
                    slot = ready.pop()
                else:
                    done = [entry for entry in used if entry[0] <= link_s]
                    entry = min(done, key=lambda e: (e[1], e[2])) if done else min(used)
                    used.remove(entry)
                    link_s, slot = max(link_s, entry[0]), entry[2]
                arrival_s = link_s = link_s + cost.expert_transfer_s
                old = cache.prepare(expert, slot, link_s)
                evicted = ExpertId(layer, old) if old != FREE else None
                result.append(Transfer(ExpertId(layer, expert), slot, num_bytes, "on_demand", evicted))
            else:
                slot = cache.slot_of[expert]
                arrival_s = cache.arrival_s.get(expert, 0.0)
            slots[expert] = slot
            gpu_end_s = max(gpu_end_s, arrival_s) + cost.gpu_expert_s[task.loads[expert]]
            if len(result) < num:
                used.append((gpu_end_s, state.policy.value(expert), slot))
        self._link_free_s[accelerator] = link_s
        return tuple(result)

    def _count(self, state: LayerState, task: Task, assignment: Assignment, num_hits: int) -> None:
        stats = self.stats
        stats.num_plans += 1
        stats.hits += num_hits
        stats.pending += len(task.arrival_s)
        stats.misses += len(task.missing)
        stats.experts_on_cpu += len(assignment.cpu)
        stats.experts_on_gpu += len(assignment.gpu)
        stats.cpu_busy_s += assignment.cpu_s
        stats.gpu_busy_s += assignment.gpu_s
        stats.link_busy_s += assignment.link_s
        stats.makespan_s += assignment.makespan_s
        num_transfers = len(assignment.transfers)
        if num_transfers:
            stats.num_transfers += num_transfers
            stats.transferred_bytes += num_transfers * state.spec.expert_bytes
        if state.prefetched:
            for expert in task.held:
                if expert in state.prefetched:
                    state.prefetched.discard(expert)
                    stats.useful_prefetches += 1

    def _prefetch_layer(self, routing: Routing, result: list[Transfer]) -> None:
        """Append the transfers that most lower the predicted makespan of one later layer."""
        state = self._layers[routing.layer]
        if not state.uses_gpu:
            return
        start_s = self._plan_end_s + state.cost.between_layers_s(routing.num_tokens)
        task = self._task(state, routing.loads, routing.num_tokens, self.now_s)
        task.link_busy_s = max(0.0, self._link_free_s[state.spec.accelerator] - start_s)
        task.arrival_s = {e: max(0.0, at_s + self.now_s - start_s) for e, at_s in task.arrival_s.items()}
        before_s = self.scheduler.assign(task).makespan_s
        candidates = sorted(task.missing, key=lambda e: (-routing.loads[e], e))
        if routing.scores is not None:
            scores = routing.scores
            candidates.sort(key=lambda e: (-routing.loads[e], -scores[e], e))
        for expert in candidates:
            if len(result) >= self.prefetch_size:
                return
            link_s = max(self.now_s, self._link_free_s[state.spec.accelerator]) + state.cost.expert_transfer_s
            task.held.append(expert)
            task.missing.remove(expert)
            task.arrival_s = {**task.arrival_s, expert: max(0.0, link_s - start_s)}
            task.num_free -= 1
            after_s = self.scheduler.assign(task).makespan_s
            if after_s >= before_s:
                return
            transfer = self._start_prefetch(state, expert, task.loads, link_s)
            if transfer is None:
                return
            before_s = after_s
            result.append(transfer)

    def _start_prefetch(
        self, state: LayerState, expert: int, protected: Mapping[int, int], arrival_s: float
    ) -> Transfer | None:
        cache, layer = state.cache, state.spec.layer
        free = cache.free_slots()
        if free:
            slot = free[0]
        else:
            candidates = cache.evictable(protected)
            if not candidates:
                return None
            slot = cache.slot_of[state.policy.rank(candidates)[0]]
        old = cache.prepare(expert, slot, arrival_s)
        state.prefetched.discard(old)
        state.prefetched.add(expert)
        self._link_free_s[state.spec.accelerator] = arrival_s
        self.stats.num_prefetches += 1
        self.stats.prefetched_bytes += state.spec.expert_bytes
        evicted = ExpertId(layer, old) if old != FREE else None
        return Transfer(ExpertId(layer, expert), slot, state.spec.expert_bytes, "prefetch", evicted)
