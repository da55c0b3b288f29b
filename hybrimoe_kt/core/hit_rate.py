"""A cache alone, without time: the hit rate of a policy on a sequence of routings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from .cache import FREE, ExpertCache
from .policies import Policy, make_policies
from .types import LayerSpec, Routing


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
