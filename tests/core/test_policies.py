"""Policies against naive references, and the hit rates on the shared traces."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import pytest

from hybrimoe_kt.core.policies import POLICIES, make_policies
from hybrimoe_kt.core.types import LayerSpec, Routing
from hybrimoe_kt.errors import ConfigError
from hybrimoe_kt.sim.hit_rate import measure_hit_rate

TRACES = Path(__file__).parents[1] / "data" / "traces"
CLASSICAL = ("lru", "lfu", "lfru", "least_stale", "static_frequency", "mrs")


def random_routings(seed: int, steps: int, layers: int = 2, num_experts: int = 16, top_k: int = 3) -> list[Routing]:
    rng, result = random.Random(seed), []
    for _ in range(steps):
        for layer in range(layers):
            chosen = sorted({int(num_experts * rng.random() ** 2) for _ in range(top_k)}, key=lambda e: rng.random())
            weights = {e: rng.random() for e in chosen}
            scores = [weights.get(e, 0.0) + rng.random() * 0.01 for e in range(num_experts)]
            result.append(Routing(layer, dict.fromkeys(chosen, 1), 1, scores, weights))
    return result


def without_scores(routing: Routing) -> Routing:
    return routing._replace(scores=None)


def specs(num_slots: int, layers: int = 2, num_experts: int = 16) -> list[LayerSpec]:
    return [LayerSpec(layer, num_experts, 3, 1, num_slots) for layer in range(layers)]


def belady_options(routings: list[Routing]) -> dict[str, object]:
    layers = sorted({r.layer for r in routings})
    return {"future": {layer: [list(r.loads) for r in routings if r.layer == layer] for layer in layers}}


def test_lru_evicts_as_an_ordered_list_does() -> None:
    policy = make_policies("lru", specs(4, 1), {})[0]
    order: list[int] = []
    for routing in random_routings(1, 200, layers=1):
        policy.touch(routing)
        for expert in reversed(list(routing.loads)):
            if expert in order:
                order.remove(expert)
            order.append(expert)
        assert policy.rank(sorted(order)) == order


@pytest.mark.parametrize("alpha", [0.1, 0.5])
def test_mrs_is_the_papers_recurrence(alpha: float) -> None:
    policy = make_policies("mrs", specs(4, 1), {"alpha": alpha, "top_p": 2.0})[0]
    average = [0.0] * 16
    for routing in random_routings(2, 2000, layers=1):
        policy.touch(routing)
        assert routing.scores is not None
        kept = sorted(range(16), key=lambda e: -routing.scores[e])[:6]  # type: ignore[index]
        average = [alpha * (routing.scores[e] if e in kept else 0.0) + (1 - alpha) * average[e] for e in range(16)]
    assert policy.rank(range(16)) == sorted(range(16), key=lambda e: average[e])


def test_mrs_without_scores_uses_the_weights() -> None:
    policy = make_policies("mrs", specs(4, 1), {})[0]
    policy.touch(Routing(0, {3: 1, 5: 1}, 1, None, {3: 0.9, 5: 0.1}))
    assert policy.value(3) > policy.value(5) > policy.value(0)


@pytest.mark.parametrize("bypass", [False, True])
def test_no_policy_beats_belady(bypass: bool) -> None:
    routings = random_routings(3, 150)
    best = measure_hit_rate(routings, specs(5), "belady", belady_options(routings), bypass=True)
    for name in POLICIES:
        options = belady_options(routings) if name == "belady" else {}
        assert measure_hit_rate(routings, specs(5), name, options, bypass=bypass) <= best


def test_belady_with_bypass_is_the_exhaustive_optimum() -> None:
    """One expert per step, two slots: compare with trying every choice of what to keep."""
    rng = random.Random(4)
    for _ in range(20):
        sequence = [rng.randrange(4) for _ in range(9)]
        routings = [Routing(0, {e: 1}) for e in sequence]
        states = {frozenset(): 0}
        for expert in sequence:
            after: dict[frozenset[int], int] = {}
            for held, hits in states.items():
                options = [held] if expert in held or len(held) == 2 else [held | {expert}]
                options += [held - {old} | {expert} for old in held if expert not in held and len(held) == 2]
                for option in options:
                    after[option] = max(after.get(option, 0), hits + (expert in held))
            states = after
        found = measure_hit_rate(routings, [LayerSpec(0, 4, 1, 1, 2)], "belady", belady_options(routings), bypass=True)
        assert found == pytest.approx(max(states.values()) / len(sequence))


def test_adaptive_learns_what_follows_a_repeated_token() -> None:
    """Six tokens of three experts each in a fixed cycle, nine slots: recency and frequency never hit, context does."""
    tokens = [[(3 * t + i) % 18 for i in range(3)] for t in range(6)]
    routings = [Routing(layer, dict.fromkeys(tokens[t % 6], 1)) for t in range(200) for layer in range(3)]
    given = [LayerSpec(layer, 18, 3, 1, 9) for layer in range(3)]
    assert measure_hit_rate(routings, given, "lru") == 0.0
    assert measure_hit_rate(routings, given, "adaptive") > 0.35


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_long_runs_stay_finite_and_prefill_is_accepted(name: str) -> None:
    routings = random_routings(5, 3000, layers=1)
    options = belady_options(routings) if name == "belady" else {}
    policy = make_policies(name, specs(4, 1), options)[0]
    policy.touch(Routing(0, {1: 40, 2: 7}, 40))
    for routing in routings:
        policy.touch(routing)
    values = [policy.value(e) for e in range(16)]
    assert all(abs(v) < 1e300 for v in values)
    ranked = policy.rank(range(16))
    assert all(policy.value(a) <= policy.value(b) + 1e-9 * abs(policy.value(b)) for a, b in pairwise(ranked))


def test_names_and_options_are_checked() -> None:
    for name, options, message in [
        ("lruu", {}, "did you mean 'lru'"),
        ("mrs", {"alhpa": 0.1}, "did you mean 'alpha'"),
        ("mrs", {"alpha": 0}, "must be between"),
        ("mrs", {"alpha": "x"}, "give a number"),
        ("lru", {"alpha": 1}, "valid: none"),
        ("adaptive", {"rate": 2}, "must be between"),
        ("belady", {}, "needs the whole trace"),
    ]:
        with pytest.raises(ConfigError, match=message):
            make_policies(name, specs(4), options)


def decode_routings(name: str) -> list[Routing]:
    trace_file = pytest.importorskip("hybrimoe_kt.sim.trace_file")
    trace = trace_file.read_trace(TRACES / f"{name}.npz")
    steps = list(trace.phase_steps("decode"))
    return [trace.routing(step, position) for step in steps for position in range(len(trace.layers))]


def test_adaptive_is_best_in_every_column_of_the_shared_traces() -> None:
    """Decode steps, caches empty at first, every miss fetched; the gap is from LRU to Belady with bypass."""
    for name in ("qwen3-30b-a3b", "gemma4-26b-a4b"):
        routings = decode_routings(name)
        layers = sorted({r.layer for r in routings})
        for num_slots in (16, 32, 64):
            given = [LayerSpec(layer, 128, 6, 1, num_slots) for layer in layers]
            rates = {policy: measure_hit_rate(routings, given, policy) for policy in (*CLASSICAL, "adaptive")}
            bound = measure_hit_rate(routings, given, "belady", belady_options(routings), bypass=True)
            closed = (rates["adaptive"] - rates["lru"]) / (bound - rates["lru"])
            row = " ".join(f"{policy} {rate:.4f}" for policy, rate in rates.items())
            print(f"{name} {num_slots} slots: {row} belady {bound:.4f}; adaptive closes {closed:.1%}")
            assert rates["adaptive"] >= max(rates[policy] for policy in CLASSICAL)
            assert closed >= 0.15


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "belady"])
def test_the_first_victim_is_the_first_of_the_ranking(name: str) -> None:
    rng = random.Random(4)
    policies = make_policies(name, specs(4), {})
    for routing in random_routings(3, 300):
        policy = policies[routing.layer]
        policy.touch(routing)
        candidates = rng.sample(range(16), 9)
        assert policy.first(candidates) == policy.rank(candidates)[0]


def test_similar_tokens_are_those_of_the_last_refresh_whenever_they_are_asked_for() -> None:
    """Votes asked for at every step and now and then are the same where both are asked for."""
    often, seldom = (make_policies("adaptive", specs(4, 5), {"refresh_layers": 3}) for _ in range(2))
    for number, routing in enumerate(random_routings(5, 200, layers=5)):
        for policies in (often, seldom):
            policies[routing.layer].touch(routing)
        ranked = often[routing.layer].rank(range(16))
        if number % 7 == 0:
            assert seldom[routing.layer].rank(range(16)) == ranked


@pytest.mark.parametrize("name", sorted(name for name, policy in POLICIES.items() if not policy.reads_scores))
def test_a_policy_that_reads_no_scores_decides_the_same_without(name: str) -> None:
    routings = random_routings(11, 60)
    options = belady_options(routings) if name == "belady" else {}
    seeing, blind = make_policies(name, specs(4), options), make_policies(name, specs(4), options)
    for routing in routings:
        seeing[routing.layer].touch(routing)
        blind[routing.layer].touch(without_scores(routing))
        assert seeing[routing.layer].rank(range(16)) == blind[routing.layer].rank(range(16))


def test_only_mrs_reads_scores() -> None:
    assert [name for name, policy in POLICIES.items() if policy.reads_scores] == ["mrs"]
