"""What the coordinator keeps per layer, and how a layer step looks to a scheduler."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from .cache import FREE, ExpertCache
from .cost import CostModel
from .link import Link
from .policies import Policy
from .scheduler import Task
from .types import LayerSpec


class LayerState:
    """One layer's slots, costs and policy, and the prefetches whose worth is not known yet.

    `prefetched` maps an expert brought ahead of need -> why ("gate" or "admission"); `displaced` maps the
    expert it evicted -> the same, until either is routed to or leaves. `hits` and `misses` count, by expert, the
    steps that routed to it and found it ready or not; `last_hits` and `last_misses` are the last single token's.
    """

    __slots__ = (
        "admission_value_s",
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
        "spec",
        "uses_gpu",
    )

    def __init__(self, spec: LayerSpec, cost: CostModel, policy: Policy, link: Link) -> None:
        self.spec = spec
        self.cost = cost
        self.policy = policy
        self.link = link
        self.resize(spec.num_slots)
        self.prefetched: dict[int, str] = {}
        self.displaced: dict[int, str] = {}
        self.admission_value_s = 0.0
        self.num_tokens = 1
        self.hits, self.misses = [0] * spec.num_experts, [0] * spec.num_experts
        self.last_hits: Sequence[int] = ()
        self.last_misses: Sequence[int] = ()
        self.predicted: Collection[int] = ()

    def resize(self, num_slots: int) -> None:
        """Begin again with `num_slots` free slots."""
        self.uses_gpu = self.cost.has_gpu and self.spec.gpu_supported and num_slots > 0
        self.cache = ExpertCache(self.spec.num_experts, num_slots if self.uses_gpu else 0)
        self.is_streaming = False

    def open_stream(self) -> None:
        """Lend this layer its stream slots."""
        if self.uses_gpu and self.spec.num_stream_slots and not self.is_streaming:
            self.cache.lend(self.spec.num_stream_slots)
            self.is_streaming = True

    def close_stream(self) -> list[int]:
        """Take the stream slots back; return the streamed experts that were never used."""
        if not self.is_streaming:
            return []
        self.is_streaming = False
        gone = self.cache.take_back(self.spec.num_stream_slots)
        return [expert for expert in gone if self.prefetched.pop(expert, None)]

    @property
    def is_whole(self) -> bool:
        """Whether every expert stands in a slot, ready."""
        cache = self.cache
        return cache.num_slots >= self.spec.num_experts and not cache.arrival_s and FREE not in cache.slot_of

    def has_all(self, experts: Collection[int]) -> bool:
        """Whether all of these are in slots or on their way."""
        slot_of = self.cache.slot_of
        return min(map(slot_of.__getitem__, experts), default=0) >= 0

    def count(self, task: Task, num_tokens: int) -> None:
        """Count a step's hits and misses by expert; one still on its way is a miss."""
        ready, absent = task.held, task.missing
        if task.arrival_s:
            ready = [e for e in task.held if e not in task.arrival_s]
            absent = [*absent, *task.arrival_s]
        hits, misses = self.hits, self.misses
        for expert in ready:
            hits[expert] += 1
        for expert in absent:
            misses[expert] += 1
        if num_tokens == 1:
            self.last_hits, self.last_misses = ready, absent

    def note_hits(self, counts: Sequence[int], last: Sequence[int]) -> None:
        """Add hits by expert, and take note of the `last` token's, if any."""
        self.hits = [hits + count for hits, count in zip(self.hits, counts, strict=True)]
        if last:
            self.last_hits, self.last_misses = list(last), []

    def hit_s(self) -> float:
        """Return what one more hit saves: a missing expert's time as CPU and link would share it."""
        cpu_s, transfer_s = self.cost.cpu_expert_s[1], self.cost.expert_transfer_s
        return cpu_s * transfer_s / (cpu_s + transfer_s) if self.uses_gpu else 0.0

    def task(self, loads: Mapping[int, int], num_tokens: int, now_s: float, start_s: float) -> Task:
        """Look residency up at virtual `now_s` and describe a step that starts at `start_s`."""
        cache = self.cache
        slot_of, arrival_s, cost, link = cache.slot_of, cache.arrival_s, self.cost, self.link
        pending = None
        num_loading = 0
        if arrival_s:
            cache.settle(now_s)
            pending = {e: at_s - start_s for e, at_s in arrival_s.items() if e in loads and at_s > start_s}
            num_loading = sum([e not in loads for e in arrival_s])
        held = [e for e in loads if slot_of[e] >= 0]
        return Task(
            cost,
            loads,
            held,
            [e for e in loads if slot_of[e] < 0] if len(held) < len(loads) else [],
            layer=self.spec.layer,
            arrival_s=pending,
            link_busy_s=link.free_s - start_s if link.free_s > start_s else 0.0,
            shared_s=cost.shared_s(num_tokens),
            admission_value_s=self.admission_value_s if num_tokens == 1 else 0.0,
            num_free=cache.num_slots - len(held) - num_loading - cache.num_pinned(loads),
        )
