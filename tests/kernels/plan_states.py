"""Random states of layers for kernels that plan: the reference's tables, and tensors with the same in them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache

import torch

from hybrimoe_kt.core.cache import FREE
from hybrimoe_kt.core.decision_table import Decision, DecisionTable
from hybrimoe_kt.core.device_rules import BROUGHT, HELD, ON_CPU, DeviceRules, LayerTables, Step
from hybrimoe_kt.core.schedule import SCHEDULERS, make_scheduler
from hybrimoe_kt.kernels.plan_tables import LRU, MRS, LayerRow, PlanForm, PlanTables, Posted, StepOutputs
from tests.core.instances import GPU_PROFILES, MODELS, cost_of

__all__ = [
    "HIDDEN",
    "Model",
    "State",
    "allocate",
    "expected_posts",
    "expected_row",
    "new_outputs",
    "new_posts",
    "probabilities_of",
    "routing_of",
]

HIDDEN = 70  # states of 140 or 280 bytes: no multiple of 16


class RandomTable(DecisionTable):
    """Entries that no scheduler gave; also such as bring more than is missing."""

    def __init__(self, rng: random.Random, top_k: int) -> None:
        self.top_k, self.side = top_k, top_k + 1
        self._entries = [Decision(0, 0, 0, 0, 0.0, 0.0, 0.0, 0.0)] * self.side**3
        for held, arriving, missing in self._combinations():
            numbers = rng.randint(0, missing + 1), rng.randint(0, held), rng.randint(0, arriving)
            room = rng.choice([0, 1, 2, 127])
            entry = Decision(*numbers, room, rng.choice([1e-3, 2e-3, rng.random()]), 0.0, 0.0, 0.0)
            self._entries[self.index(held, arriving, missing)] = entry


@cache
def real_table(number: int, top_k: int) -> DecisionTable:
    """One of three for each top-k, of schedulers, profiles and models that differ."""
    rng = random.Random(f"{number} {top_k}")
    cost = cost_of(rng.choice(GPU_PROFILES), rng.choice(list(MODELS)))
    return DecisionTable(make_scheduler(rng.choice(sorted(SCHEDULERS)), {}), cost, top_k)


class State:
    """One layer: `layer` as the reference has it, and which `table` it follows."""

    def __init__(self, rng: random.Random, num_experts: int, top_k: int, table: DecisionTable) -> None:
        num_slots = rng.choice([2, top_k, num_experts, rng.randint(2, num_experts), rng.randint(2, num_experts)])
        self.table, self.num_slots = table, max(2, num_slots)
        self.layer = LayerTables.empty(num_experts, self.num_slots)
        self.layer.clock = rng.randint(0, 1 << 20)
        self.layer.num_copies = rng.randint(self.num_slots, 1 << 20)
        self._fill(rng)
        highest = rng.choice([3, 3, 1 << 30])
        self.layer.scores = [rng.randint(0, highest) for _ in range(num_experts)]
        self.layer.check()

    def _fill(self, rng: random.Random) -> None:
        layer, num_experts = self.layer, len(self.layer.slot_of)
        numbers = rng.sample(range(1, layer.num_copies + 1), self.num_slots)
        num_free = rng.choice([0, 0, 1, rng.randint(0, self.num_slots)])
        free = set(rng.sample(range(self.num_slots), num_free))
        is_arriving = rng.choice([0.0, 0.2, 0.6])
        who = rng.sample(range(num_experts), self.num_slots)
        for slot, expert in enumerate(who):
            layer.issued[slot] = layer.landed[slot] = numbers[slot]
            if slot in free:
                continue
            layer.expert_of[slot], layer.slot_of[expert] = expert, slot
            if rng.random() < is_arriving:
                layer.landed[slot] = rng.randint(0, numbers[slot] - 1)

    def some_land(self, rng: random.Random) -> None:
        """Between two steps."""
        for slot in range(self.num_slots):
            if self.layer.is_arriving(slot) and rng.random() < 0.4:
                self.layer.landed[slot] = self.layer.issued[slot]


class Model:
    """A model's layers on one accelerator, their rules, and their tensors."""

    def __init__(self, seed: int, num_layers: int = 1, shape_seed: int | None = None) -> None:
        shape, self.rng = random.Random(seed if shape_seed is None else shape_seed), random.Random(f"state {seed}")
        num_experts = shape.choice([8, 60, 64, 128, 256, shape.randint(8, 256)])
        self.top_k = shape.randint(1, min(10, num_experts))
        self.rules = DeviceRules(
            shape.choice(["mrs", "mrs", "lru"]),
            shape.choice([1966, 1, 1 << 16, shape.randint(1, 1 << 16)]),
            shape.choice([0.5, 1.0, 2.0, 3.0]),
            prefetch_size=shape.randint(0, 3),
            admission=shape.random() < 0.7,
            bypass=shape.random() < 0.5,
        )
        self.num_experts, self.kept = num_experts, self.rules.kept(num_experts, self.top_k)
        classes = [self._table() for _ in range(min(2, num_layers))]
        class_of = [self.rng.randrange(len(classes)) for _ in range(num_layers)]
        self.states = [State(self.rng, num_experts, self.top_k, classes[each]) for each in class_of]
        self.classes, self.class_of = classes, class_of
        self.form = PlanForm(
            num_experts,
            self.top_k,
            MRS if self.rules.policy == "mrs" else LRU,
            self.rules.alpha,
            self.kept,
            self.rules.bypass,
            self.rules.prefetch_size,
            self.rules.admission,
        )

    def _table(self) -> DecisionTable:
        if self.rng.random() < 0.5:
            return RandomTable(self.rng, self.top_k)
        return real_table(self.rng.randrange(3), self.top_k)

    def tables(self, device: torch.device) -> PlanTables:
        """New tensors with the layers' states in them."""
        slots, class_of = [state.num_slots for state in self.states], [*self.class_of]
        tables = PlanTables(self.form, slots, class_of, lambda size: allocate(size, device))
        for number in range(max(class_of) + 1):
            tables.tables[number] = torch.tensor(self.classes[number].packed(), dtype=torch.int32)
            tables.gains[number] = torch.tensor(self.classes[number].gains_ns(), dtype=torch.int32).clamp(max=_MOST)
        for state, row in zip(self.states, tables.rows, strict=True):
            for name, values in self.expected(state).items():
                getattr(row, name).copy_(torch.tensor(values, dtype=torch.int32))
        return tables

    @staticmethod
    def expected(state: State) -> dict[str, list[int]]:
        """What a row has of the layer itself."""
        layer = state.layer
        names = ("slot_of", "expert_of", "scores", "issued", "landed")
        fields = {name: list(getattr(layer, name)) for name in names}
        return fields | {"counts": [layer.clock, layer.num_copies]}


_MOST = (1 << 31) - 1


def allocate(size: int, device: torch.device) -> torch.Tensor:
    return torch.full((size,), -77, dtype=torch.int32, device=device)


def routing_of(rng: random.Random, state: State, top_k: int) -> list[int]:
    """Experts all different; often such as are in slots or arriving."""
    everybody = list(range(len(state.layer.slot_of)))
    rng.shuffle(everybody)
    arriving = [e for e in everybody if (s := state.layer.slot_of[e]) != FREE and state.layer.is_arriving(s)]
    held = [e for e in everybody if state.layer.slot_of[e] != FREE]
    first = held[: rng.randint(0, top_k)] + arriving[: rng.randint(0, top_k)] if rng.random() < 0.8 else []
    ids = list(dict.fromkeys([*first, *everybody]))[:top_k]
    rng.shuffle(ids)
    return ids


def probabilities_of(rng: random.Random, num_experts: int) -> list[float]:
    """As a softmax gives them, or with many equals, or beyond what they may be."""
    kind = rng.randrange(4)
    if kind == 0:
        logits = torch.tensor([rng.gauss(0, 2) for _ in range(num_experts)])
        return logits.softmax(0).tolist()
    if kind == 1:
        return [rng.choice([0.0, 1.0 / 8, 1.0 / 16]) for _ in range(num_experts)]
    if kind == 2:  # one above or below another by the least there is
        return [(rng.randint(0, 3) + rng.choice([0.0, 0.5])) / (1 << 24) for _ in range(num_experts)]
    return [rng.choice([0.0, 1.0, -0.5, 1.5, float("nan"), float("inf"), 0.3]) for _ in range(num_experts)]


def new_outputs(form: PlanForm, device: torch.device) -> StepOutputs:
    sizes = form.num_experts, form.num_experts, 3 * form.top_k, 1
    resident, late, copies, on_cpu = (allocate(size, device) for size in sizes)
    return StepOutputs(resident, late, copies.view(-1, 3), on_cpu)


def new_posts(form: PlanForm, dtype: torch.dtype, device: torch.device) -> Posted:
    """Page-locked where there is a device; poisoned, nothing asked."""
    lock = device.type == "cuda"
    return Posted(
        torch.full((HIDDEN,), -77.0, dtype=dtype, pin_memory=lock),
        torch.full((form.top_k,), -77, pin_memory=lock),
        torch.full((form.top_k,), -77.0, pin_memory=lock),
        torch.zeros(1, dtype=torch.int32, pin_memory=lock),
        torch.zeros(1, dtype=torch.int32, pin_memory=lock),
    )


def expected_row(row: LayerRow, step: Step, found: Sequence[int], form: PlanForm) -> dict[str, torch.Tensor]:
    """What a step adds to a row's counts before it is taken, and its record and outputs; `found` were in slots."""
    visits, totals, hits, misses = (part.clone().cpu() for part in (row.visits, row.totals, row.hits, row.misses))
    visits[step.entry] += 1
    totals[0] += len(step.copies)
    totals[1] += step.doing.count(ON_CPU)
    for expert in step.ids:
        (hits if expert in found else misses)[expert] += 1
    old = {copy.expert: copy.evicted for copy in step.copies}
    evicted = [old.get(expert, FREE) for expert in step.ids]
    record = row.record.clone().cpu()
    noted = [*step.ids, *step.doing, *step.slots, *evicted, step.entry, 0]
    record[: len(noted)] = torch.tensor(noted, dtype=torch.int32)
    resident, late = (torch.full((form.num_experts,), FREE, dtype=torch.int32) for _ in range(2))
    for expert, what, slot in zip(step.ids, step.doing, step.slots, strict=True):
        if what != ON_CPU:
            (resident if what == HELD else late)[expert] = slot
    copies = torch.full((form.top_k, 3), -1, dtype=torch.int32)
    for number, copy in enumerate(step.copies):
        copies[number] = torch.tensor([copy.expert, copy.slot, copy.number], dtype=torch.int32)
    assert step.doing.count(BROUGHT) == len(step.copies)
    on_cpu = torch.tensor([int(ON_CPU in step.doing)], dtype=torch.int32)
    counted = {"visits": visits, "totals": totals, "hits": hits, "misses": misses, "record": record}
    return counted | {"resident": resident, "late": late, "copies": copies, "on_cpu": on_cpu}


def expected_posts(before: Posted, step: Step, weights: torch.Tensor, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the host finds, by name of the field."""
    names = ("inbox", "ids", "weights", "asked", "done")
    fields = {name: getattr(before, name).clone() for name in names}
    one, asked = torch.ones(1, dtype=torch.int32), [what == ON_CPU for what in step.doing]
    if not any(asked):
        return fields | {"done": one}
    ids = torch.tensor([expert if on_cpu else -1 for expert, on_cpu in zip(step.ids, asked, strict=True)])
    return {"inbox": hidden, "ids": ids, "weights": weights, "asked": one, "done": 0 * one}
