"""What a device decides, played by the host: a coordinator whose single tokens follow `device_rules`.

For replays, and to hold what a device has done to what it should have done. Prompts, and steps of several tokens, are
the ordinary coordinator's: the two hand each other the slots and what experts are worth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hybrimoe_kt.errors import ConfigError

from .coordinator import Coordinator
from .cost import CostModel
from .decision_table import DecisionTable
from .device_rules import (
    ARRIVING,
    BROUGHT,
    HELD,
    ON_CPU,
    Copy,
    DeviceRules,
    Guess,
    LayerTables,
    Step,
    look_ahead,
    plan_step,
    shares_of,
)
from .link import Link
from .schedule import Scheduler
from .strategy import Strategy
from .types import ExpertId, LayerSpec, Orders, Plan, Routing, Transfer, TransferKind

__all__ = ["DeviceCoordinator", "DeviceTables", "as_plan", "as_transfer", "rules_of"]

_NOTHING = Orders()


class DeviceTables:
    """Decision tables by class of layers: those that cost the same and route to as many experts share one."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._known: dict[tuple[CostModel, int], tuple[DecisionTable, list[int]]] = {}

    def of(self, cost: CostModel, top_k: int) -> tuple[DecisionTable, list[int]]:
        """The table of such layers and its gains in nanoseconds."""
        key = cost, top_k
        if key not in self._known:
            table = DecisionTable(self._scheduler, cost, top_k)
            self._known[key] = table, table.gains_ns()
        return self._known[key]


def rules_of(strategy: Strategy, *, bypass: bool = False) -> DeviceRules:
    """The device's rules for what a user has chosen. ConfigError for a policy that devices do not have."""
    size = strategy.prefetch_size
    if size and strategy.predictor != "stale_gate":
        raise ConfigError(f"planner device looks ahead by predictor stale_gate, not by {strategy.predictor!r}")
    admission = strategy.admits and size > 0
    return DeviceRules.of(
        strategy.policy, strategy.policy_options, prefetch_size=size, admission=admission, bypass=bypass
    )


def as_transfer(layer: int, copy: Copy, num_bytes: int, kind: TransferKind) -> Transfer:
    """A copy as the host has it."""
    evicted = ExpertId(layer, copy.evicted) if copy.evicted >= 0 else None
    return Transfer(ExpertId(layer, copy.expert), copy.slot, num_bytes, kind, evicted)


def as_plan(spec: LayerSpec, step: Step, table: DecisionTable, issued: Sequence[int]) -> Plan:
    """A device's step as the host has plans; those that arrive in the order of `issued`, by slot."""
    by_doing: dict[int, list[int]] = {HELD: [], ARRIVING: [], BROUGHT: [], ON_CPU: []}
    for place, doing in enumerate(step.doing):
        by_doing[doing].append(place)
    arriving = sorted(by_doing[ARRIVING], key=lambda place: issued[step.slots[place]])
    brought = [copy.expert for copy in step.copies]
    launched = [*by_doing[HELD], *arriving]
    slots = {step.ids[place]: step.slots[place] for place in launched} | {c.expert: c.slot for c in step.copies}
    held = sum(doing == HELD for doing in step.doing)
    entry = table.entry(step.entry)
    return Plan(
        spec.layer,
        tuple(step.ids[place] for place in by_doing[ON_CPU]),
        (*(step.ids[place] for place in launched), *brought),
        tuple(as_transfer(spec.layer, copy, spec.expert_bytes, "on_demand") for copy in step.copies),
        slots,
        entry.makespan_s,
        entry.cpu_s,
        held + entry.left,
    )


@dataclass(slots=True)
class _Layer:
    spec: LayerSpec
    cost: CostModel
    link: Link
    table: DecisionTable
    gains_ns: list[int]
    state: LayerTables
    arrives_s: dict[int, tuple[Copy, float]] = field(default_factory=dict)
    """Slot -> the copy under way into it, and when it lands."""

    def land(self, now_s: float) -> None:
        for slot in [slot for slot, (_, at_s) in self.arrives_s.items() if at_s <= now_s]:
            self.state.land(self.arrives_s.pop(slot)[0])

    def send(self, copy: Copy, now_s: float, kind: TransferKind) -> Transfer:
        transfer = as_transfer(self.spec.layer, copy, self.spec.expert_bytes, kind)
        self.arrives_s[copy.slot] = copy, self.link.add(transfer, now_s, self.cost.expert_transfer_s)
        return transfer


class DeviceCoordinator:
    """Call it as `Coordinator`, whose decisions for anything but single tokens it passes on. Not thread-safe."""

    def __init__(self, host: Coordinator, rules: DeviceRules | None = None) -> None:
        """`host` has layers, costs, scheduler and slots; ConfigError where its policy has no rules on a device."""
        self.host, self.strategy, self.stats = host, host.strategy, host.stats
        self.rules = rules or rules_of(host.strategy)
        tables = DeviceTables(host.scheduler)
        links: dict[int, Link] = {}
        self._layers: dict[int, _Layer] = {}
        for spec, cost in host.layers():
            table, gains_ns = tables.of(cost, spec.top_k)
            state = LayerTables.empty(spec.num_experts, min(spec.num_slots, spec.num_experts))
            link = links.setdefault(spec.accelerator, Link())
            self._layers[spec.layer] = _Layer(spec, cost, link, table, gains_ns, state)
        self._is_device = False
        self._open: tuple[Plan, Step] | None = None

    def state_of(self, layer: int) -> LayerTables:
        """A layer's tables, while single tokens are planned."""
        return self._layers[layer].state

    def plan(self, routing: Routing) -> Plan:
        """Decide one layer step."""
        if routing.num_tokens > 1 or not routing.is_decode:
            self._give_back()
            return self.host.plan(routing)
        self._take_over()
        layer = self._layers[routing.layer]
        layer.land(self.host.now_s)
        ids = list(routing.loads)
        step = plan_step(layer.state, self.rules, layer.table, ids, shares_of(_probabilities(routing, layer.spec)))
        plan = as_plan(layer.spec, step, layer.table, layer.state.issued)
        for copy in step.copies:
            layer.send(copy, self.host.now_s, "on_demand")
        self._count(layer, step, plan)
        self._open = plan, step
        return plan

    def prefetch(self, plan: Plan, predictions: Sequence[Routing] = ()) -> Orders:
        """Return what is started for later layers and tokens; see `Coordinator.prefetch`."""
        if self._open is None:
            return self.host.prefetch(plan, predictions)
        if not self.rules.prefetch_size:
            return _NOTHING
        layer, step = self._layers[plan.layer], self._open[1]
        later = [self._layers[guess.layer] for guess in predictions]
        for other in later:
            other.land(self.host.now_s)
        guesses = [
            Guess(other.state, other.table, other.gains_ns, _by_score(guess))
            for other, guess in zip(later, predictions, strict=True)
        ]
        ahead, admitted = look_ahead(layer.state, step, guesses, self.rules)
        transfers = [later[place].send(copy, self.host.now_s, "prefetch") for place, copy in ahead]
        transfers += [layer.send(copy, self.host.now_s, "prefetch") for copy in admitted]
        self.stats.num_prefetches += len(transfers)
        self.stats.prefetched_bytes += sum(transfer.num_bytes for transfer in transfers)
        self.stats.link_busy_s += len(transfers) * layer.cost.expert_transfer_s
        return Orders(tuple(transfers))

    def finish(self, plan: Plan) -> Orders:
        """What was brought on demand has landed; time passes."""
        if self._open is None:
            return self.host.finish(plan)
        layer, step = self._layers[plan.layer], self._open[1]
        self._open = None
        for copy in step.copies:
            layer.arrives_s.pop(copy.slot, None)
            layer.state.land(copy)
        step_s = plan.makespan_s + layer.cost.between_layers_s[1]
        self.host.now_s += step_s
        self.stats.elapsed_s += step_s
        return _NOTHING

    def _take_over(self) -> None:
        if not self._is_device:
            for number, layer in self._layers.items():
                layer.state = self.host.hand_over(number)
                layer.arrives_s.clear()
            self._is_device = True

    def _give_back(self) -> None:
        if self._is_device:
            for number, layer in self._layers.items():
                self.host.take_back(number, layer.state)
            self._is_device = False

    def _count(self, layer: _Layer, step: Step, plan: Plan) -> None:
        stats, entry = self.stats, layer.table.entry(step.entry)
        stats.num_plans += 1
        stats.hits += plan.num_hits
        arriving = sum(doing == ARRIVING for doing in step.doing) + entry.given_up
        stats.pending += arriving
        stats.misses += len(step.ids) - plan.num_hits - arriving
        stats.experts_on_cpu += len(plan.cpu)
        stats.experts_on_gpu += len(plan.gpu)
        stats.num_transfers += len(plan.transfers)
        stats.transferred_bytes += sum(transfer.num_bytes for transfer in plan.transfers)
        stats.cpu_busy_s += entry.cpu_s
        stats.gpu_busy_s += entry.gpu_s
        stats.link_busy_s += entry.link_s
        stats.makespan_s += entry.makespan_s


def _probabilities(routing: Routing, spec: LayerSpec) -> Sequence[float]:
    """What scores learn from: the router's probabilities, else the routed experts' weights."""
    if routing.scores is not None:
        return routing.scores
    given: Mapping[int, float] = routing.weights if routing.weights is not None else routing.loads
    found = [0.0] * spec.num_experts
    for expert, weight in given.items():
        found[expert] = weight
    return found


def _by_score(guess: Routing) -> list[int]:
    scores = guess.scores
    return list(guess.loads) if scores is None else sorted(guess.loads, key=lambda e: (-scores[e], e))
