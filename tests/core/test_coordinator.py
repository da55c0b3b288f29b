"""The coordinator: plans that partition, slots that hold what they should, pins, failures, determinism."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys

import pytest

from hybrimoe_kt.core.coordinator import Coordinator
from hybrimoe_kt.core.policies import POLICIES
from hybrimoe_kt.core.prefetch.predictors import PREDICTORS
from hybrimoe_kt.core.schedule import SCHEDULERS
from hybrimoe_kt.core.strategy import Strategy
from hybrimoe_kt.core.types import LayerSpec, Orders, Routing
from hybrimoe_kt.errors import ConfigError
from tests.core.instances import cost_of
from tests.core.mirror import Mirror
from tests.core.walks import EXPERT_BYTES, MODEL, drive, make_coordinator, walk


@pytest.mark.parametrize("num_slots", [0, 1, 2, 5, 16])
@pytest.mark.parametrize("scheduler", sorted(SCHEDULERS))
def test_every_expert_is_computed_once_from_the_right_slot(scheduler: str, num_slots: int) -> None:
    coordinator = make_coordinator(num_slots, scheduler=scheduler, prefetch_size=2, prefetch_depth=2)
    mirror = Mirror(dict.fromkeys(range(3), num_slots))
    mirror.follow(Orders(transfers=coordinator.initial_transfers()))
    routings = walk(7, 30)
    for position, routing in enumerate(routings):
        made = coordinator.plan(routing)
        assert sorted([*made.cpu, *made.gpu]) == sorted(routing.loads)
        assert set(made.slots) == set(made.gpu)
        mirror.follow(made)
        ahead = coordinator.prefetch(made, routings[position + 1 : position + 3])
        for transfer in ahead.transfers:
            if transfer.expert.layer == made.layer:
                assert transfer.slot not in made.slots.values(), "a prefetch may not touch a slot in use"
        mirror.follow(ahead)
        coordinator.check_integrity()
        mirror.follow(coordinator.finish(made))
    coordinator.check_integrity()
    assert coordinator.stats.num_plans == 90


def test_gpu_only_streams_a_whole_layer_through_one_slot() -> None:
    coordinator = make_coordinator(1, layers=1, scheduler="gpu_only", prefetch_size=0)
    coordinator.initial_transfers()
    plan = coordinator.plan(Routing(0, dict.fromkeys(range(6), 1)))
    assert (len(plan.gpu), len(plan.transfers), set(plan.slots.values())) == (6, 5, {0})
    coordinator.finish(plan)
    coordinator.check_integrity()


def test_layers_without_gpu_support_stay_on_the_cpu() -> None:
    specs = [LayerSpec(0, 8, 2, 100, 8, gpu_supported=False), LayerSpec(1, 8, 2, 100, 8)]
    coordinator = Coordinator(specs, cost_of("default", MODEL))
    assert {t.expert.layer for t in coordinator.initial_transfers()} == {1}
    assert coordinator.plan(Routing(0, {1: 1, 2: 1})).gpu == ()
    on_gpu = Coordinator(specs, cost_of("default", MODEL), Strategy(prefetch_size=0))
    on_gpu.initial_transfers()
    assert set(on_gpu.plan(Routing(1, {1: 1, 2: 1})).gpu) == {1, 2}


def test_a_failed_transfer_leaves_a_free_slot() -> None:
    coordinator = make_coordinator(4, layers=1, scheduler="gpu_only", prefetch_size=0)
    coordinator.initial_transfers()
    plan = coordinator.plan(Routing(0, {9: 1, 10: 1}))
    coordinator.fail(plan.transfers[0])
    coordinator.finish(plan)
    cache = coordinator._layers[0].cache
    assert plan.transfers[0].expert.index not in cache.occupant
    assert plan.transfers[1].expert.index in cache.occupant
    assert len(cache.free_slots()) == 1
    coordinator.check_integrity()


def test_finishing_twice_is_a_bug_that_is_named() -> None:
    coordinator = make_coordinator(4, layers=1)
    coordinator.initial_transfers()
    plan = coordinator.plan(Routing(0, {0: 1}))
    coordinator.finish(plan)
    with pytest.raises(AssertionError, match="finished once"):
        coordinator.finish(plan)


def test_start_with_given_frequencies() -> None:
    coordinator = make_coordinator(2, layers=1, frequencies={0: [float(e % 5) for e in range(16)]})
    assert {t.expert.index for t in coordinator.initial_transfers()} == {4, 9}


def test_links_belong_to_accelerators() -> None:
    specs = [LayerSpec(0, 8, 2, EXPERT_BYTES, 4, accelerator=0), LayerSpec(1, 8, 2, EXPERT_BYTES, 4, accelerator=1)]
    coordinator = Coordinator(specs, cost_of("default", MODEL), Strategy(scheduler="gpu_only", prefetch_size=0))
    coordinator.plan(Routing(0, dict.fromkeys(range(4), 1)))
    busy_s = [coordinator._layers[layer].link.busy_s(coordinator.now_s) for layer in (0, 1)]
    assert busy_s[0] > 0 and busy_s[1] == 0


def test_bad_options_are_one_sentence() -> None:
    for options, message in [
        ({"scheduler": "balancd"}, "did you mean 'balanced'"),
        ({"policy": "mru"}, "unknown policy 'mru'"),
        ({"predictor": "perfekt"}, "did you mean 'perfect'"),
        ({"prefetch_size": -1}, "prefetch_size is -1"),
        ({"prefetch_depth": 9}, "prefetch_depth is 9"),
        ({"policy_options": {"rat": 0.1}}, "did you mean 'rate'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            make_coordinator(2, **options)
    with pytest.raises(ConfigError, match="no MoE layers"):
        Coordinator([], cost_of("default", MODEL))


def digest(seed: int, **options: object) -> str:
    """Hash every decision of a walk: ids, slots and order, no floating-point numbers."""
    coordinator = make_coordinator(5, prefetch_size=2, prefetch_depth=2, **options)
    found = hashlib.sha256(repr(coordinator.initial_transfers()).encode())
    for _, plan, prefetches, aborted in drive(coordinator, walk(seed, 40), look_ahead=2):
        found.update(repr((plan.cpu, plan.gpu, plan.transfers, sorted(plan.slots.items()), prefetches)).encode())
        found.update(repr(aborted).encode())
    return found.hexdigest()


@pytest.mark.parametrize("policy", sorted(set(POLICIES) - {"belady"}))
def test_same_routings_same_decisions(policy: str) -> None:
    assert digest(3, policy=policy) == digest(3, policy=policy)


def test_decisions_do_not_depend_on_the_hash_seed() -> None:
    code = "from tests.core.test_coordinator import digest; print(digest(5))"
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": "."},
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs == [digest(5) + "\n"] * 2


@pytest.mark.parametrize("predictor", sorted(PREDICTORS))
def test_predictors_keep_the_cache_consistent(predictor: str) -> None:
    coordinator = make_coordinator(4, predictor=predictor, prefetch_size=3, prefetch_depth=3)
    coordinator.initial_transfers()
    for _ in drive(coordinator, walk(11, 60), look_ahead=3):
        coordinator.check_integrity()
    stats = coordinator.stats.snapshot()
    assert stats["useful_prefetches"] + stats["wasted_prefetches"] <= stats["num_prefetches"]
    assert 0 <= stats["precision"] <= 1
    assert 0 <= stats["recall"] <= 1


def test_core_imports_nothing_but_the_standard_library() -> None:
    code = (
        "import sys; before = set(sys.modules)\n"
        "import hybrimoe_kt.core.coordinator, hybrimoe_kt.core.profile\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(n for n in new if n not in sys.stdlib_module_names and n != 'hybrimoe_kt'))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_core_never_reads_a_clock() -> None:
    """The same walk under a profiler that forbids the time module's functions."""
    coordinator, rng = make_coordinator(5, prefetch_size=2), random.Random(0)
    names: set[str] = set()

    def watch(frame: object, event: str, function: object) -> None:
        if event == "c_call":
            names.add(f"{getattr(function, '__module__', '')}.{getattr(function, '__name__', '')}")

    routings = walk(rng.randrange(100), 10)
    sys.setprofile(watch)
    try:
        for _ in drive(coordinator, routings, look_ahead=1):
            pass
    finally:
        sys.setprofile(None)
    assert not {name for name in names if name.startswith(("time.", "random.", "_random.", "_thread."))}


@pytest.mark.parametrize("scheduler", ["balanced", "gpu_only", "cpu_only"])
@pytest.mark.parametrize("prefetch_size", [0, 2])
def test_when_a_plan_is_learnt_from_changes_nothing(scheduler: str, prefetch_size: int) -> None:
    options = {"scheduler": scheduler, "prefetch_size": prefetch_size, "prefetch_depth": 2}
    early, late = make_coordinator(5, **options), make_coordinator(5, **options)
    assert early.initial_transfers() == late.initial_transfers()
    routings = walk(5, 40)
    for position, routing in enumerate(routings):
        ahead = routings[position + 1 : position + 3]
        plan, same = early.plan(routing), late.plan(routing)
        early.learn()
        early.learn()  # once is enough
        assert plan == same
        assert early.prefetch(plan, ahead) == late.prefetch(same, ahead)
        assert early.finish(plan) == late.finish(same)
        assert early.stats.snapshot() == late.stats.snapshot()
    assert early.heat() == late.heat()
    assert early.stats.num_plans == len(routings)


def test_a_plan_without_transfers_waits_for_no_learning(monkeypatch: pytest.MonkeyPatch) -> None:
    coordinator = make_coordinator(16, scheduler="static")
    coordinator.initial_transfers()
    touched: list[Routing] = []
    for state in coordinator._layers.values():
        monkeypatch.setattr(state.policy, "touch", touched.append)
    routing = walk(5, 1)[0]
    plan = coordinator.plan(routing)
    assert not touched and not plan.transfers
    coordinator.finish(plan)
    assert touched == [routing]


def test_scores_are_wanted_where_policy_or_predictor_reads_them() -> None:
    assert not make_coordinator(4).reads_scores
    assert make_coordinator(4, policy="mrs").reads_scores
    assert make_coordinator(4, predictor="corrected_gate").reads_scores


def test_loads_are_believed_before_the_number_of_tokens() -> None:
    """A routing that says one token and names loads beyond one is planned by its loads."""
    after_light, at_once = make_coordinator(8, layers=2), make_coordinator(8, layers=2)
    for coordinator in (after_light, at_once):
        coordinator.initial_transfers()
    after_light.finish(after_light.plan(Routing(0, dict.fromkeys(range(4, 12), 1))))
    heavy = Routing(1, dict.fromkeys(range(4, 12), 64))
    assert after_light.plan(heavy) == at_once.plan(heavy)
