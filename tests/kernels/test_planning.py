"""Kernels that plan, their naive forms and the rules of the core, on random states: the same to the bit."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import fields

import pytest
import torch

pytest.importorskip("triton")

from hybrimoe_kt.backends.gpu_triton import target_of
from hybrimoe_kt.core import device_rules
from hybrimoe_kt.core.cache import FREE
from hybrimoe_kt.core.device_rules import Guess, Step, shares_of
from hybrimoe_kt.kernels.fetch import fetch, naive_fetch
from hybrimoe_kt.kernels.land import land, naive_land
from hybrimoe_kt.kernels.look_ahead import look_ahead, naive_look_ahead
from hybrimoe_kt.kernels.plan_configs import WaitConfig, fetch_config, plan_config
from hybrimoe_kt.kernels.plan_step import naive_plan_step, plan_step
from hybrimoe_kt.kernels.plan_tables import ARRIVING, PlanForm, PlanTables, SlotAddresses
from hybrimoe_kt.kernels.wait_landed import naive_wait_landed, wait_landed
from tests.kernels.layers import DEVICE
from tests.kernels.plan_states import (
    HIDDEN,
    Model,
    allocate,
    expected_posts,
    expected_row,
    new_outputs,
    new_posts,
    probabilities_of,
    routing_of,
)

pytestmark = pytest.mark.kernels

TARGET, CPU = target_of(DEVICE), torch.device("cpu")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
STEPS = 3  # of one state, one after the other


def model_of(seed: int, num_layers: int) -> Model:
    """Where kernels are compiled, a few shapes only: each takes a second."""
    return Model(seed, num_layers, None if TARGET.interpreted else seed % 4)


def assert_same(found: object, wanted: Mapping[str, torch.Tensor], what: str) -> None:
    """Every named tensor, bit for bit."""
    for name, tensor in wanted.items():
        there = getattr(found, name).cpu()
        assert torch.equal(there, tensor.cpu()), f"{what}: {name} is {there.tolist()}, not {tensor.tolist()}"


def steps_of(seed: int) -> None:
    """Plan `STEPS` steps of one random state by rules, naive form and kernel, and compare every tensor."""
    model = model_of(seed, 1)
    rng, state, form = model.rng, model.states[0], model.form
    naive, device = model.tables(CPU), model.tables(DEVICE)
    outputs = new_outputs(form, CPU), new_outputs(form, DEVICE)
    dtype, posts = FLOATS[seed % 3], None
    for _ in range(STEPS):
        ids, probabilities = routing_of(rng, state, model.top_k), probabilities_of(rng, model.num_experts)
        weights, hidden = torch.rand(model.top_k), torch.randn(HIDDEN).to(dtype)
        if rng.random() < 0.7:
            posts = new_posts(form, dtype, CPU), new_posts(form, dtype, DEVICE)
        layer, row = state.layer, naive.rows[0]
        ready = [e for e in ids if layer.slot_of[e] != FREE and not layer.is_arriving(layer.slot_of[e])]
        shares = shares_of([0.0 if math.isnan(each) else each for each in torch.tensor(probabilities).tolist()])
        step = device_rules.plan_step(layer, model.rules, state.table, ids, shares)
        wanted = expected_row(row, step, ready, form)
        asked = expected_posts(posts[0], step, weights, hidden) if posts else {}

        given = torch.tensor(ids), weights, torch.tensor(probabilities), hidden
        naive_plan_step(row, form, *given, outputs[0], posts[0] if posts else None)
        at_device = [part.to(DEVICE) for part in given]
        shown = posts[1] if posts else None
        plan_step(device.rows[0], form, *at_device, outputs[1], shown, plan_config(TARGET, form.num_experts))

        names = {each.name for each in fields(row)} & set(wanted)
        of_layer = {name: torch.tensor(values, dtype=torch.int32) for name, values in model.expected(state).items()}
        for place, tables in enumerate((naive, device)):
            what = f"seed {seed}, {'kernel' if place else 'naive'}"
            assert_same(tables.rows[0], of_layer | {name: wanted[name] for name in names}, what)
            assert_same(outputs[place], {name: part for name, part in wanted.items() if name not in names}, what)
            if posts:
                assert_same(posts[place], asked, what)
        assert torch.equal(naive.tables, device.tables.cpu())
        state.some_land(rng)
        for tables in (naive, device):
            tables.rows[0].landed.copy_(torch.tensor(state.layer.landed, dtype=torch.int32))


@pytest.mark.parametrize("part", [pytest.param(n, marks=() if n < 3 else pytest.mark.slow) for n in range(5)])
def test_a_step_is_planned_as_the_rules_say(part: int) -> None:
    for number in range(10):
        steps_of(10 * part + number)


@pytest.mark.slow
def test_ten_thousand_states_are_planned_as_the_rules_say() -> None:
    for seed in range(1000, 1000 + -(-10_000 // STEPS)):
        steps_of(seed)


def recorded(model: Model, place: int, rng: random.Random) -> tuple[Step, list[int]]:
    """A step of one layer as the rules plan it, which changes the layer, and its record."""
    state = model.states[place]
    ids, probabilities = routing_of(rng, state, model.top_k), probabilities_of(rng, model.num_experts)
    shares = shares_of([0.0 if math.isnan(each) else each for each in torch.tensor(probabilities).tolist()])
    step = device_rules.plan_step(state.layer, model.rules, state.table, ids, shares)
    old = {copy.expert: copy.evicted for copy in step.copies}
    evicted = [old.get(expert, FREE) for expert in ids]
    return step, [*ids, *step.doing, *step.slots, *evicted, step.entry, 0]


def look_ahead_of(seed: int) -> int:
    """Look ahead from a random step of a random model by rules, naive form and kernel; how many copies that ordered."""
    model = model_of(seed, 4)
    rng, form = model.rng, model.form
    num_later = rng.randint(0, 3)
    place = rng.randint(0, 3 - num_later)
    step, record = recorded(model, place, rng)
    naive, device = model.tables(CPU), model.tables(DEVICE)
    for tables in (naive, device):
        tables.rows[place].record[: len(record)] = torch.tensor(record, dtype=torch.int32)
    later = [model.states[place + 1 + ahead] for ahead in range(num_later)]
    ids = [routing_of(rng, state, model.top_k) for state in later]
    guesses = [
        Guess(state.layer, state.table, state.table.gains_ns(), chosen)
        for state, chosen in zip(later, ids, strict=True)
    ]
    copies, own = device_rules.look_ahead(model.states[place].layer, step, guesses, model.rules)
    everything = [(place + 1 + ahead, copy) for ahead, copy in copies] + [(place, copy) for copy in own]

    wanted_copies = torch.full((form.prefetch_size, 4), -1, dtype=torch.int32)
    noted = torch.full((form.prefetch_size, 4), -1, dtype=torch.int32)
    totals = torch.zeros(4, 4, dtype=torch.int32)
    for number, (layer, copy) in enumerate(everything):
        wanted_copies[number] = torch.tensor([layer, copy.expert, copy.slot, copy.number], dtype=torch.int32)
        noted[number] = torch.tensor([layer, copy.expert, copy.slot, copy.evicted], dtype=torch.int32)
        totals[layer, 2 + (layer == place)] += 1
    wanted_record = torch.tensor([*record[:-1], len(everything), *noted.flatten().tolist()], dtype=torch.int32)

    given = torch.tensor(ids, dtype=torch.int64).reshape(num_later, model.top_k)
    outs = [allocate(4 * form.prefetch_size, each).view(-1, 4) for each in (CPU, DEVICE)]
    naive_look_ahead(naive, place, num_later, given, outs[0])
    look_ahead(device, place, num_later, given.to(DEVICE), outs[1], plan_config(TARGET, form.num_experts))
    for tables, out, name in ((naive, outs[0], "naive"), (device, outs[1], "kernel")):
        what = f"seed {seed}, {name}"
        assert torch.equal(out.cpu(), wanted_copies), f"{what}: copies are {out.tolist()}, not {wanted_copies.tolist()}"
        assert torch.equal(tables.parts["totals"].cpu(), totals), what
        for number, row in enumerate(tables.rows):
            expected = model.expected(model.states[number])
            assert_same(row, {key: torch.tensor(part, dtype=torch.int32) for key, part in expected.items()}, what)
            record_of = wanted_record if number == place else torch.zeros_like(wanted_record)
            assert_same(row, {"record": record_of, "visits": torch.zeros_like(row.visits)}, what)
    return len(everything)


def test_copies_ahead_of_need_are_ordered_as_the_rules_say() -> None:
    assert sum(look_ahead_of(seed) for seed in range(40)) > 10


@pytest.mark.slow
def test_a_thousand_looks_ahead_are_as_the_rules_say() -> None:
    assert sum(look_ahead_of(seed) for seed in range(1000, 2000)) > 300


def small_tables(device: torch.device, num_layers: int = 3) -> PlanTables:
    return PlanTables(PlanForm(8, 2), [3, 4, 2][:num_layers], [0, 0, 0][:num_layers], lambda n: allocate(n, device))


@pytest.mark.parametrize("is_layered", [False, True], ids=["one-layer", "layers"])
def test_experts_are_fetched_and_land(is_layered: bool) -> None:
    """As torch's indexing moves them; sizes differ by layer, and none is a whole number of pieces."""
    sizes, lock = [16 * 1001, 48, 16 * 257], DEVICE.type == "cuda"
    seeded = torch.Generator().manual_seed(1)
    experts = [torch.randint(0, 255, (8, size), generator=seeded, dtype=torch.uint8) for size in sizes]
    experts = [part.pin_memory() if lock else part for part in experts]
    rows = [[0, 5, 2, 9], [-1, -1, -1, -1], [2, 7, 0, 3], [0, 1, 0, 10], [1, 0, 3, 1]]
    place = 0
    if not is_layered:
        rows = [row[1:] for row in rows if row[0] in (-1, place)]
    copies = torch.tensor(rows, dtype=torch.int32)
    for device, is_kernel in ((CPU, False), (DEVICE, True)):
        slots = [
            torch.full((count, size), 77, dtype=torch.uint8, device=device)
            for count, size in zip((3, 4, 2), sizes, strict=True)
        ]
        wanted = [part.cpu().clone() for part in slots]
        addresses = SlotAddresses(
            torch.tensor([part.data_ptr() for part in experts], device=device),
            torch.tensor([part.data_ptr() for part in slots], device=device),
            torch.tensor(sizes, device=device),
        )
        tables = small_tables(device)
        landed = tables.parts["landed"].cpu().clone()
        for row in rows:
            layer, expert, slot, number = row if is_layered else (place, *row)
            if expert >= 0:
                wanted[layer][slot] = experts[layer][expert]
                landed[layer, slot] = number
        if is_kernel:
            fetch(copies.to(device), addresses, fetch_config(TARGET), place)
            land(copies.to(device), tables, place)
        else:
            naive_fetch(copies, addresses, place)
            naive_land(copies, tables, place)
        for found, part in zip(slots, wanted, strict=True):
            assert torch.equal(found.cpu(), part)
        assert torch.equal(tables.parts["landed"].cpu(), landed)


@pytest.mark.parametrize("landed", [4, 5, 6], ids=["not-landed", "landed", "a-later-one-too"])
@pytest.mark.parametrize("form", ["naive", "kernel"])
def test_waiting_ends_when_all_have_landed_or_the_looks_are_spent(form: str, landed: int) -> None:
    device = CPU if form == "naive" else DEVICE
    tables, timed_out = small_tables(device), torch.zeros(1, dtype=torch.int32, device=device)
    row, config = tables.rows[1], WaitConfig(polls=5)
    row.record[:8] = torch.tensor([6, 1, ARRIVING, 0, 3, 0, -1, -1], dtype=torch.int32)
    row.issued[3], row.landed[3], row.issued[0] = 5, landed, 9  # what is not said to arrive is not waited for
    before = row.landed.clone()
    for turn in range(2):
        (naive_wait_landed if form == "naive" else wait_landed)(row, tables.form, timed_out, config)
        assert timed_out.item() == (landed < 5) * (turn + 1)
    assert torch.equal(row.landed, before)
