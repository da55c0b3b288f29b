"""Prefetching: what is chosen, what is aborted, what is learned, and that it stops when it does not pay."""

from __future__ import annotations

import random
from itertools import product

import pytest

from hybrimoe_kt.core.coordinator import Coordinator
from hybrimoe_kt.core.cost import CostModel
from hybrimoe_kt.core.link import Link
from hybrimoe_kt.core.prefetch.benefit import Benefit
from hybrimoe_kt.core.prefetch.predictors import PREDICTORS, make_predictor
from hybrimoe_kt.core.strategy import Strategy
from hybrimoe_kt.core.types import ExpertId, LayerSpec, Routing, Transfer
from hybrimoe_kt.errors import ConfigError
from tests.core.walks import make_coordinator, walk


def cost(transfer: float = 1.0, dense: float = 5.0) -> CostModel:
    return CostModel(
        cpu=lambda n: 10.0 * n, gpu=lambda n: 1.0, link_bytes_per_s=1 / transfer, expert_bytes=1, dense_s=dense
    )


def started(coordinator: Coordinator, plan_of: Routing, *guesses: Routing) -> list[tuple[int, int]]:
    plan = coordinator.plan(plan_of)
    result = [tuple(t.expert) for t in coordinator.prefetch(plan, guesses).transfers]
    coordinator.finish(plan)
    return result  # type: ignore[return-value]


def two_layers(size: int, *, num_slots: int = 2, model: CostModel | None = None) -> Coordinator:
    specs = [LayerSpec(layer, 8, 2, 1, num_slots) for layer in range(3)]
    strategy = Strategy(policy="lru", prefetch_size=size, prefetch_depth=3, admission=False)
    coordinator = Coordinator(specs, model or cost(), strategy)
    coordinator.initial_transfers()  # experts 0 and 1 of each layer
    return coordinator


def test_the_highest_load_gains_most() -> None:
    assert started(two_layers(1), Routing(0, {0: 1}), Routing(1, {5: 1, 6: 3}, 3)) == [(1, 6)]


def test_of_equal_loads_the_most_probable_goes_first() -> None:
    scores = [0.0, 0.0, 0.0, 0.0, 0.0, 0.2, 0.7, 0.1]
    assert started(two_layers(1), Routing(0, {0: 1}), Routing(1, {5: 1, 6: 1}, 1, scores)) == [(1, 6)]


def test_residents_are_not_fetched_again_and_size_zero_is_off() -> None:
    assert started(two_layers(2), Routing(0, {0: 1}), Routing(1, {0: 1, 1: 1})) == []
    assert started(two_layers(0), Routing(0, {0: 1}), Routing(1, {5: 1, 6: 1})) == []


def test_deeper_layers_only_get_idle_link_time() -> None:
    slow = cost(transfer=50.0)
    assert started(two_layers(2, model=slow), Routing(0, {0: 1}), Routing(1, {0: 1}), Routing(2, {5: 1})) == []
    fast = cost(transfer=1.0)
    found = started(two_layers(2, model=fast), Routing(0, {0: 1}), Routing(1, {0: 1}), Routing(2, {5: 1}))
    assert found == [(2, 5)]


def test_what_has_not_started_is_aborted_when_the_prediction_changes() -> None:
    coordinator = two_layers(3, model=cost(transfer=4.0, dense=5.0))
    plan = coordinator.plan(Routing(0, {0: 1}))
    queued = coordinator.prefetch(plan, [Routing(1, {5: 1, 6: 1}), Routing(2, {5: 1})]).transfers
    assert [tuple(t.expert) for t in queued] == [(1, 5), (1, 6), (2, 5)]
    coordinator.finish(plan)  # six seconds later the second copy is under way, the third waits
    plan = coordinator.plan(Routing(1, {5: 1, 6: 1}))
    assert plan.dropped == ()
    again = coordinator.prefetch(plan, [Routing(2, {7: 1})])
    assert [tuple(t.expert) for t in again.dropped] == [(2, 5)]
    assert [tuple(t.expert) for t in again.transfers] == [(2, 7)]
    assert coordinator.stats.num_aborted == 1
    coordinator.finish(plan)
    coordinator.check_integrity()


def test_an_aborted_transfer_moves_the_rest_forward() -> None:
    link = Link()
    transfers = [Transfer(ExpertId(0, e), e, 1, "prefetch") for e in range(3)]
    assert [link.add(t, 0.0, 2.0) for t in transfers] == [2.0, 4.0, 6.0]
    dropped, moved = link.abort(1.0, lambda t: t.expert.index in (0, 1))
    assert dropped == [transfers[1]], "the first has started"
    assert [(entry.transfer, entry.end_s) for entry in moved] == [(transfers[2], 4.0)]
    assert link.busy_s(1.0) == 3.0


def test_admission_keeps_what_the_cpu_computed() -> None:
    coordinator = make_coordinator(4, layers=1, policy="lru", prefetch_size=1, scheduler="static", admission=True)
    coordinator.initial_transfers()
    plan = coordinator.plan(Routing(0, {0: 1, 9: 1}))
    transfers = coordinator.prefetch(plan).transfers
    assert [tuple(t.expert) for t in transfers] == [(0, 9)]
    assert transfers[0].slot not in plan.slots.values()
    coordinator.finish(plan)
    plan = coordinator.plan(Routing(0, {9: 1}))
    assert plan.gpu == (9,)


def test_benefit_switches_off_and_tries_again() -> None:
    benefit = Benefit(pause=10)
    for _ in range(40):
        if benefit.is_on:
            benefit.add(-1e-6)
    assert not benefit.is_on
    for _ in range(10):
        benefit.tick()
    assert benefit.is_on
    for _ in range(200):
        benefit.add(1e-6)
    assert benefit.is_on


@pytest.mark.parametrize("accuracy", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("num_slots", [4, 8])
def test_prefetching_is_never_slower_than_not(accuracy: float, num_slots: int) -> None:
    """Predicted seconds, wrong predictions included: within 1 % of off at worst, and faster when they are right."""
    routings, seconds = walk(3, 400), {}
    for size in (0, 2):
        rng = random.Random(5)
        coordinator = make_coordinator(num_slots, prefetch_size=size, admission=False)
        coordinator.initial_transfers()
        for position, routing in enumerate(routings):
            plan = coordinator.plan(routing)
            for true in routings[position + 1 : position + 2]:
                loads = {(e if rng.random() < accuracy else rng.randrange(16)): load for e, load in true.loads.items()}
                coordinator.prefetch(plan, [Routing(true.layer, loads, true.num_tokens)])
            coordinator.finish(plan)
        seconds[size] = coordinator.now_s
    print(f"accuracy {accuracy}, {num_slots} slots: {seconds[2] / seconds[0]:.3f} of the time without")
    assert seconds[2] <= seconds[0] * (0.99 if accuracy == 1.0 else 1.01)


def specs(layers: int = 2) -> list[LayerSpec]:
    return [LayerSpec(layer, 6, 2, 1, 2) for layer in range(layers)]


def test_corrected_gate_learns_a_constant_error() -> None:
    raw, corrected = make_predictor("stale_gate", specs(), {}), make_predictor("corrected_gate", specs(), {})
    wrong, right = [0.5, 0.1, 0.3, 0.1, 0.0, 0.0], [0.1, 0.1, 0.3, 0.5, 0.0, 0.0]
    guess, truth = Routing(1, {0: 1, 2: 1}, 1, wrong), Routing(1, {3: 1, 2: 1}, 1, right)
    here = Routing(0, {0: 1, 1: 1})
    for _ in range(40):
        corrected.predict(here, [guess], 1)
        corrected.observe(truth)
    assert set(raw.predict(here, [guess], 1)[0].loads) == {0, 2}
    assert set(corrected.predict(here, [guess], 1)[0].loads) == {3, 2}


def test_transitions_are_learned_and_wrap_around() -> None:
    predictor = make_predictor("transition", specs(), {})
    for token, layer in product(range(3000), range(2)):
        kind = token % 2
        predictor.observe(Routing(layer, {kind: 1, 4: 1} if layer == 0 else {2 + kind: 1, 5: 1}))
    assert set(predictor.predict(Routing(0, {1: 1}), (), 1)[0].loads) == {3, 5}
    assert predictor.predict(Routing(1, {2: 1}), (), 1)[0].layer == 0
    assert predictor.predict(Routing(0, {1: 9}, 9), (), 1) == ()


def test_transitions_are_learned_from_batches_that_decode() -> None:
    predictor = make_predictor("transition", specs(), {})
    for _ in range(3):
        predictor.observe(Routing(0, {0: 2, 1: 1}, 2, phase="decode"))
        predictor.observe(Routing(1, {2: 1, 3: 2}, 2, phase="decode"))
    (guess,) = predictor.predict(Routing(0, {0: 1, 1: 1}, 2, phase="decode"), (), 1)
    assert set(guess.loads) == {2, 3}
    assert predictor.predict(Routing(0, {0: 1, 1: 1}, 2), (), 1) == (), "a prompt's"


def test_history_predicts_the_most_used() -> None:
    predictor = make_predictor("history", specs(), {})
    for _ in range(20):
        predictor.observe(Routing(1, {4: 1, 2: 1}))
    assert set(predictor.predict(Routing(0, {0: 1}), (), 1)[0].loads) == {2, 4}


def test_predictor_names_and_options() -> None:
    with pytest.raises(ConfigError, match="did you mean 'transition'"):
        make_predictor("transitions", specs(), {})
    with pytest.raises(ConfigError, match="did you mean 'rate'"):
        make_predictor("history", specs(), {"rat": 0.5})


@pytest.mark.parametrize("name", sorted(name for name, kind in PREDICTORS.items() if not kind.reads_scores))
def test_a_predictor_that_reads_no_scores_predicts_the_same_without(name: str) -> None:
    seeing, blind = make_predictor(name, specs(), {}), make_predictor(name, specs(), {})
    rng = random.Random(3)
    for step in range(40):
        loads = dict.fromkeys(rng.sample(range(6), 2), 1)
        scored = Routing(step % 2, loads, 1, [rng.random() for _ in range(6)])
        bare = Routing(step % 2, loads)
        seeing.observe(scored)
        blind.observe(bare)
        given = [Routing(1 - step % 2, loads, 1, [rng.random() for _ in range(6)])]
        assert seeing.predict(scored, given, 1) == blind.predict(bare, given, 1)
