"""Caches alone, without time: hit rates of policies on a trace's routings, where every miss is fetched."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from hybrimoe_kt.core.cache import FREE, ExpertCache
from hybrimoe_kt.core.policies import Policy, make_policies
from hybrimoe_kt.core.types import LayerSpec, Routing
from hybrimoe_kt.errors import ConfigError

from .trace import Step, Trace


class Lookup(NamedTuple):
    """What one routing found, before the missing experts were admitted."""

    routing: Routing
    missing: tuple[int, ...]
    occupant: tuple[int, ...]
    """The expert in each slot once they are, FREE where there is none."""


def look_up(
    routings: Iterable[Routing],
    specs: Sequence[LayerSpec],
    policy: str,
    options: Mapping[str, Any] | None = None,
    *,
    bypass: bool = False,
) -> Iterator[Lookup]:
    """Yield what each routing finds when every miss is fetched, each layer starting empty with its own slots.

    With `bypass` a fetched expert that is worth less than what it would evict is used and not kept.
    """
    policies = dict(zip([spec.layer for spec in specs], make_policies(policy, specs, options or {}), strict=True))
    caches = {spec.layer: ExpertCache(spec.num_experts, spec.num_slots) for spec in specs}
    for routing in routings:
        cache, layer_policy = caches[routing.layer], policies[routing.layer]
        layer_policy.touch(routing)
        missing = tuple([e for e in routing.loads if cache.slot_of[e] == FREE])
        if missing:
            _admit(cache, layer_policy, missing, () if bypass else routing.loads)
        yield Lookup(routing, missing, tuple(cache.occupant))


def measure_hit_rate(
    routings: Iterable[Routing],
    specs: Sequence[LayerSpec],
    policy: str,
    options: Mapping[str, Any] | None = None,
    *,
    bypass: bool = False,
) -> float:
    """Return hits / routed experts of `look_up`."""
    hits = total = 0
    for found in look_up(routings, specs, policy, options, bypass=bypass):
        total += len(found.routing.loads)
        hits += len(found.routing.loads) - len(found.missing)
    return hits / total if total else 0.0


def _admit(
    cache: ExpertCache, policy: Policy, missing: Sequence[int], protected: Mapping[int, int] | tuple[()]
) -> None:
    """Give slots to `missing`; without protection the least valuable of old and new go without one."""
    slots = cache.free_slots()
    victims: list[int] = []
    admitted = list(missing)
    num = len(missing) - len(slots)
    if num > 0:
        candidates = cache.evictable(protected)
        if protected:
            victims = policy.rank(candidates)[:num]
            admitted = admitted[: len(slots) + len(victims)]
        else:
            losers = set(policy.rank([*candidates, *missing])[:num])
            victims = [e for e in candidates if e in losers]
            admitted = [e for e in missing if e not in losers]
    for victim in victims:
        slots.append(cache.slot_of[victim])
        cache.release(victim)
    for expert, slot in zip(admitted, slots, strict=False):
        cache.prepare(expert, slot, 0.0)
        cache.complete(expert)


def future(trace: Trace) -> dict[int, list[list[int]]]:
    """Return layer -> the experts of each step, prompt included: what the offline policy knows."""
    return {
        layer: [list(trace.routing(step, position).loads) for step in trace.steps]
        for position, layer in enumerate(trace.layers)
    }


def hit_rate(
    trace: Trace, policy: str, num_slots: int, options: Mapping[str, Any] | None = None, *, bypass: bool = False
) -> float:
    """Return the share of routed experts of the decode steps found in one of `num_slots` slots per layer.

    Caches start empty. `belady` is told the future; `bypass` keeps a fetched expert only if it is worth more than
    what it would evict.
    """
    steps = list(trace.phase_steps("decode"))
    given = dict(options or {}) | _knowing(trace, policy, steps)
    routings = [trace.routing(step, position) for step in steps for position in range(len(trace.layers))]
    return measure_hit_rate(routings, trace.specs(num_slots), policy, given, bypass=bypass)


def _knowing(trace: Trace, policy: str, steps: Sequence[Step]) -> dict[str, Any]:
    """The future of `steps` for the policy that needs it."""
    if policy != "belady":
        return {}
    layers = enumerate(trace.layers)
    return {"future": {layer: [list(trace.routing(step, place).loads) for step in steps] for place, layer in layers}}


def usual_steps(trace: Trace) -> list[Step]:
    """The decode steps; all steps of a trace that has none."""
    return list(trace.phase_steps("decode")) or list(trace.steps)


def hits_per_step(trace: Trace, policy: str, num_slots: int) -> list[tuple[int, int]]:
    """Return hits and routed experts of each of the `usual_steps`, over all layers; caches start empty."""
    steps = usual_steps(trace)
    routings = [trace.routing(step, position) for step in steps for position in range(len(trace.layers))]
    found = look_up(routings, trace.specs(num_slots), policy, _knowing(trace, policy, steps))
    counts = [(len(one.routing.loads) - len(one.missing), len(one.routing.loads)) for one in found]
    width = len(trace.layers)
    rows = [counts[at : at + width] for at in range(0, len(counts), width)]
    return [(sum(hits for hits, _ in row), sum(routed for _, routed in row)) for row in rows]


def windowed(counts: Sequence[tuple[int, int]], window: int) -> list[float]:
    """Return the hit rate of each step and those before it, `window` steps together at most."""
    result, hits, routed = [], 0, 0
    for at, (step_hits, step_routed) in enumerate(counts):
        old = counts[at - window] if at >= window else (0, 0)
        hits, routed = hits + step_hits - old[0], routed + step_routed - old[1]
        result.append(hits / routed if routed else 0.0)
    return result


def occupancy(trace: Trace, policy: str, num_slots: int, layer: int) -> list[Lookup]:
    """Return what each of the `usual_steps` finds in one layer's cache, and who is in its slots after it.

    ConfigError for a layer that the trace does not have.
    """
    if layer not in trace.layers:
        raise ConfigError(f"layer {layer} is no MoE layer of this trace; valid: {_ranges(trace.layers)}")
    steps, position = usual_steps(trace), trace.layers.index(layer)
    routings = [
        routing for step in steps for routing in (trace.routing(step, place) for place in range(len(trace.layers)))
    ]
    found = look_up(routings, trace.specs(num_slots), policy, _knowing(trace, policy, steps))
    return [one for number, one in enumerate(found) if number % len(trace.layers) == position]


def _ranges(layers: Sequence[int]) -> str:
    """Write consecutive layers as 0 to 5."""
    is_one = list(layers) == list(range(layers[0], layers[-1] + 1))
    return f"{layers[0]} to {layers[-1]}" if is_one and len(layers) > 2 else ", ".join(map(str, layers))


def hit_rate_curves(trace: Trace, policies: Sequence[str], slots: Sequence[int]) -> dict[str, list[float]]:
    """Return each policy's hit rate at each number of slots per layer."""
    return {policy: [hit_rate(trace, policy, count) for count in slots] for policy in policies}
