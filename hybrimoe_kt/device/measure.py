"""Times CPU experts, GPU experts and the link, as the executor will use them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from hybrimoe_kt.core.types import ExpertId

from .accelerator import Accelerator, Stream
from .backend import CpuBackend, GpuBackend, Routed
from .experts import LayerExperts
from .host_store import HostStore
from .layout import SlotLayout
from .waiting import SHARE_SLEPT, Deadline

__all__ = ["CpuMeter", "GpuMeter", "LinkMeter", "Sample"]


@dataclass(frozen=True, slots=True)
class Sample:
    """Repeated measurements of one thing, seconds: the median, and the 10th and 90th percentile."""

    median_s: float
    low_s: float
    high_s: float
    count: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Sample:
        ordered = sorted(seconds)
        last = len(ordered) - 1
        return cls(statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)], len(ordered))

    @classmethod
    def repeat(cls, repeats: int, once: Callable[[int], float]) -> Sample:
        """Measure `repeats` times after one warm-up; `once(number)` returns seconds."""
        once(repeats)
        return cls.of([once(number) for number in range(repeats)])

    def __str__(self) -> str:
        return f"{self.median_s * 1e3:.3f} ms ({self.low_s * 1e3:.3f} to {self.high_s * 1e3:.3f}, {self.count} times)"


class CpuMeter:
    """CPU experts of one layer, each call on other experts than the call before, so that none is in a cache."""

    def __init__(self, backend: CpuBackend, experts: LayerExperts, deadline: Deadline) -> None:
        self._backend, self._experts, self._deadline = backend, experts, deadline
        self._next = 0

    def call(self, num_experts: int, load: int, repeats: int) -> Sample:
        """One call in which `num_experts` experts (at most top-k) get `load` tokens each."""
        hidden = torch.randn(load, self._experts.hidden)
        weights = torch.full((load, num_experts), 1.0 / num_experts)
        usual_s = 0.0

        def once(number: int) -> float:
            nonlocal usual_s
            chosen = [(self._next + place) % self._experts.num_experts for place in range(num_experts)]
            self._next += num_experts
            ids = torch.tensor([chosen]).repeat(load, 1)
            began = time.perf_counter()
            self._backend.submit(self._experts.layer, Routed(hidden, ids, weights))
            self._deadline.wait(self._backend.is_done, "a CPU expert", rest_s=SHARE_SLEPT * usual_s)
            self._backend.wait()
            seconds = time.perf_counter() - began
            usual_s += (seconds - usual_s) * (0.2 if usual_s else 1.0)
            return seconds

        return Sample.repeat(repeats, once)


class GpuMeter:
    """GPU experts of one layer in `num_slots` slots of their own."""

    def __init__(
        self,
        accelerator: Accelerator,
        gpu: GpuBackend,
        store: HostStore,
        layer: int,
        *,
        num_slots: int,
        max_tokens: int,
        deadline: Deadline,
    ) -> None:
        self._accelerator, self._gpu, self._deadline = accelerator, gpu, deadline
        self._experts, layout = store.layers[layer], store.layouts[layer]
        self.num_slots = min(num_slots, self._experts.top_k, self._experts.num_experts)
        self._memory = accelerator.allocate(self.num_slots * layout.slot_bytes)
        memory = self._memory.view(self.num_slots, layout.slot_bytes)
        for slot in range(self.num_slots):
            _fill(store, layout, ExpertId(layer, slot), memory[slot])
        gpu.add_layer(self._experts, layout, memory)
        gpu.prepare(max_tokens)
        self._done = accelerator.event()

    def launch(self, num_experts: int, load: int, repeats: int, launches: int = 8) -> Sample:
        """One launch of `num_experts` experts with `load` tokens each, out of `launches` in a row."""
        experts, device = self._experts, self._accelerator.device
        slots = [(slot, slot) for slot in range(num_experts)]
        table = torch.full((experts.num_experts,), -1, dtype=torch.int32)
        table[:num_experts] = torch.arange(num_experts, dtype=torch.int32)
        table = table.to(device)
        ids = torch.arange(num_experts).repeat(load, 1).to(device)
        hidden = torch.randn(load, experts.hidden, device=device)
        weights = torch.full((load, num_experts), 1.0 / num_experts, device=device)
        routed = Routed(hidden, ids, weights)
        shape = (load, num_experts, experts.hidden) if self._gpu.answers_pairs else (load, experts.hidden)
        out = torch.zeros(shape, device=device)
        compute = self._accelerator.compute

        def work() -> None:
            self._gpu.launch(experts.layer, slots, table, routed, out)

        def once(number: int) -> float:
            began = time.perf_counter()
            for _ in range(launches):
                self._accelerator.launch(compute, work, reads=(), writes=(), site="measured experts")
            compute.record(self._done, "measured experts")
            self._deadline.wait(self._done.is_done, "measured experts")
            return (time.perf_counter() - began) / launches

        return Sample.repeat(repeats, once)

    def release(self) -> None:
        """Give the slots back."""
        self._accelerator.release(self._memory)


class LinkMeter:
    """Copies from host to device."""

    def __init__(self, accelerator: Accelerator, max_bytes: int, deadline: Deadline) -> None:
        self._accelerator, self._deadline = accelerator, deadline
        self._target = accelerator.allocate(max_bytes)
        self._page_locked = accelerator.page_locked(max_bytes)
        self._pageable = torch.empty(max_bytes, dtype=torch.uint8)
        self._page_locked.zero_()
        self._pageable.zero_()
        self._stream: Stream = accelerator.stream("measured copies")
        self._done = accelerator.event()

    def copy(self, num_bytes: int, repeats: int, *, page_locked: bool = True, copies: int = 4) -> Sample:
        """One copy of `num_bytes`, out of `copies` in a row."""
        source = (self._page_locked if page_locked else self._pageable)[:num_bytes]
        target = self._target[:num_bytes]

        def once(number: int) -> float:
            began = time.perf_counter()
            for _ in range(copies):
                self._accelerator.copy(self._stream, target, source, "measured copy")
            self._stream.record(self._done, "measured copy")
            self._deadline.wait(self._done.is_done, "a measured copy")
            return (time.perf_counter() - began) / copies

        return Sample.repeat(repeats, once)

    def keep_busy(self, num_bytes: int) -> Callable[[], None]:
        """Return what to call again and again to keep the link busy: it enqueues a copy whenever the last is done."""
        source, target = self._page_locked[:num_bytes], self._target[:num_bytes]

        def feed() -> None:
            if self._done.is_done():
                for _ in range(2):
                    self._accelerator.copy(self._stream, target, source, "measured copy")
                self._stream.record(self._done, "measured copy")

        return feed

    def release(self) -> None:
        """Give the memory back once nothing copies into it."""
        self._deadline.wait(self._done.is_done, "measured copies")
        self._accelerator.release(self._target)


def _fill(store: HostStore, layout: SlotLayout, expert: ExpertId, slot: torch.Tensor) -> None:
    laid_out = torch.zeros(layout.slot_bytes, dtype=torch.uint8)
    layout.write(store.parts(expert), laid_out)
    slot.copy_(laid_out)
