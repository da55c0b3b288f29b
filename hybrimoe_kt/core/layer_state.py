"""What the coordinator keeps per layer, and how a layer step looks to a scheduler."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from .cache import FREE, ExpertCache
from .cost import CostModel
from .link import Link
from .policies import Policy
from .schedule.base import Task
from .types import ExpertId, LayerSpec, Transfer, TransferKind


class LayerState:
    """One layer's slots, costs and policy, and what prefetching has done to its slots.

    `prefetched` maps an expert brought ahead of need -> why ("gate", "admission" or "stream"); `displaced` maps the
    expert it evicted -> the same, until either is routed to or leaves; `proven` are prefetched experts that were used
    once and still hold their slots. `hits` and `misses` count, by expert, the
    steps that routed to it and found it ready or not; `last_hits` and `last_misses` are the last single token's.
    """

    __slots__ = (
        "cache",
        "cost",
        "displaced",
        "hits",
        "is_streaming",
        "last_hits",
        "last_misses",
        "link",
        "misses",
        "num_tokens",
        "policy",
        "predicted",
        "prefetched",
        "proven",
        "spec",
        "uses_gpu",
    )

    def __init__(self, spec: LayerSpec, cost: CostModel, policy: Policy, link: Link) -> None:
        self.spec = spec
        self.cost = cost
        self.policy = policy
        self.link = link
        self.prefetched: dict[int, str] = {}
        self.displaced: dict[int, str] = {}
        self.proven: dict[int, str] = {}
        self.resize(spec.num_slots)
        self.num_tokens = 1
        self.hits, self.misses = [0] * spec.num_experts, [0] * spec.num_experts
        self.last_hits: Sequence[int] = ()
        self.last_misses: Sequence[int] = ()
        self.predicted: Collection[int] = ()

    def resize(self, num_slots: int) -> None:
        """Begin again with `num_slots` free slots."""
        self.uses_gpu = self.cost.has_gpu and self.spec.gpu_supported and num_slots > 0
        self.cache = ExpertCache(self.spec.num_experts, num_slots if self.uses_gpu else 0)
        self.displaced.clear()
        self.is_streaming = False

    def adopt(self, expert_of: Sequence[int]) -> None:
        """Have these experts stand in the slots, ready; what prefetching had done there is forgotten."""
        self.cache = ExpertCache(self.spec.num_experts, self.cache.num_slots)
        for slot, expert in enumerate(expert_of):
            if expert != FREE:
                self.cache.prepare(expert, slot, 0.0)
                self.cache.complete(expert)
        self.prefetched.clear()
        self.displaced.clear()
        self.proven.clear()

    def open_buffer(self) -> None:
        """Lend this layer its buffer slots."""
        if self.uses_gpu and self.spec.num_buffer_slots and not self.is_streaming:
            self.cache.lend(self.spec.num_buffer_slots)
            self.is_streaming = True

    def close_buffer(self) -> list[int]:
        """Take the buffer slots back; return the experts that stood there."""
        self.is_streaming = False
        return self.cache.take_back(self.spec.num_buffer_slots)

    @property
    def first_buffer_slot(self) -> int:
        """The number of the first lent slot, while some are lent."""
        return self.cache.num_slots - self.spec.num_buffer_slots

    def send(self, expert: int, slot: int, start_s: float, kind: TransferKind) -> Transfer:
        """Put the transfer of `expert` into `slot` on the link, not before `start_s`, and book it in the cache."""
        spec, cache = self.spec, self.cache
        old = cache.occupant[slot]
        evicted = ExpertId(spec.layer, old) if old != FREE else None
        transfer = Transfer(ExpertId(spec.layer, expert), slot, spec.expert_bytes, kind, evicted)
        cache.prepare(expert, slot, self.link.add(transfer, start_s, self.cost.expert_transfer_s))
        return transfer

    def prefetch(self, expert: int, slot: int, start_s: float, why: str) -> Transfer:
        """Bring `expert` ahead of need."""
        self.displaced.pop(expert, None)
        self.prefetched[expert] = why
        return self.send(expert, slot, start_s, "prefetch")

    def displace(self, expert: int, why: str) -> None:
        """Note what a prefetch evicts. Without prefetching, an expert that it brought would not be there to lose."""
        if expert not in self.prefetched and expert not in self.proven:
            self.displaced[expert] = why

    def forget(self, expert: int) -> bool:
        """Note that `expert` has lost its slot; whether it had been prefetched and was never used."""
        self.proven.pop(expert, None)
        return self.prefetched.pop(expert, None) is not None

    def note_used(self, experts: Sequence[int]) -> tuple[int, dict[int, str]]:
        """Take note of a step's experts in slots.

        Returns how many prefetches were used for the first time, and the experts that stand there by one -> why.
        """
        prefetched, proven = self.prefetched, self.proven
        num_first, gained = 0, {}
        for expert in experts:
            if expert in prefetched:
                num_first += 1
                if (why := prefetched.pop(expert)) != "stream":
                    proven[expert] = why
            if expert in proven:
                gained[expert] = proven[expert]
        return num_first, gained

    def note_missed(self, experts: Sequence[int]) -> dict[int, str]:
        """Take note of a step's missing experts; returns those that a prefetch had evicted -> why."""
        return {expert: self.displaced.pop(expert) for expert in experts if expert in self.displaced}

    @property
    def is_whole(self) -> bool:
        """Whether every expert stands in a slot, ready."""
        cache = self.cache
        return cache.num_slots >= self.spec.num_experts and not cache.arrival_s and FREE not in cache.slot_of

    def count(self, ready: Sequence[int], absent: Sequence[int], *, is_decode: bool) -> None:
        """Count a step's hits and misses by expert."""
        hits, misses = self.hits, self.misses
        for expert in ready:
            hits[expert] += 1
        for expert in absent:
            misses[expert] += 1
        if is_decode:
            self.last_hits, self.last_misses = ready, absent

    def note_hits(self, counts: Sequence[int], last: Sequence[int]) -> None:
        """Add hits by expert, and take note of the `last` token's, if any."""
        self.hits = [hits + count for hits, count in zip(self.hits, counts, strict=True)]
        if last:
            self.last_hits, self.last_misses = list(last), []

    def task(self, loads: Mapping[int, int], num_tokens: int, now_s: float, start_s: float) -> Task:
        """Look residency up at virtual `now_s` and describe a step that starts at `start_s`."""
        cache = self.cache
        slot_of, arrival_s, cost, link = cache.slot_of, cache.arrival_s, self.cost, self.link
        pending: Mapping[int, float] = {}
        num_loading = 0
        if arrival_s:
            cache.settle(now_s)
            pending = {e: at_s - start_s for e, at_s in arrival_s.items() if e in loads and at_s > start_s}
            num_loading = sum([e not in loads for e in arrival_s])
        held: list[int] = []
        missing: list[int] = []
        for expert in loads:
            (held if slot_of[expert] >= 0 else missing).append(expert)
        found = set(loads.values())
        return Task(
            cost,
            loads,
            held,
            missing,
            self.spec.layer,
            pending,
            link.free_s - start_s if link.free_s > start_s else 0.0,
            cost.shared_s[num_tokens],
            cache.num_slots - len(held) - num_loading - (cache.num_pinned(loads) if cache.num_pins else 0),
            found.pop() if len(found) == 1 else 0,
        )
