"""An accelerator that runs its work as late, as early and as interleaved as its promises allow.

`--accelerator emulated:adversarial[:SEED]`. Fresh memory holds NaN in every format, released memory is handed out
again first, copies are partial until their last step, and every declared access goes through the race detector.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from hybrimoe_kt.core.cost import CostModel
from hybrimoe_kt.core.profile import Profile
from hybrimoe_kt.device.accelerator import HostStamp, Stamp
from hybrimoe_kt.device.backend import CpuBackend, GpuBackend, Routed
from hybrimoe_kt.device.recorder import Recorder
from hybrimoe_kt.device.step_graph import StepCapture, StepGraph
from hybrimoe_kt.errors import CapacityError

from .adversary import Adversary, Mark, Queue
from .faults import Faults
from .immediate import host_available_bytes

__all__ = ["AdversarialAccelerator", "WatchedCpu"]

_POISON = 0xFF
"""Makes NaN of every float format's bytes, and so of every quantisation's half-precision scales."""


class _Event:
    """Remembers its last mark."""

    def __init__(self, adversary: Adversary) -> None:
        self._adversary = adversary
        self.mark: Mark | None = None
        self.site = ""

    def is_done(self) -> bool:
        return self._adversary.host_sees(self.mark, f"host: {self.site}")


class _Stream:
    def __init__(self, adversary: Adversary, queue: Queue) -> None:
        self._adversary, self.queue = adversary, queue

    def wait(self, event: Any, site: str) -> None:
        self._adversary.wait(self.queue, event.mark, site)

    def record(self, event: Any, site: str) -> None:
        if site == self._adversary.ignore:
            self._adversary.ignored += 1
            return
        event.mark, event.site = self._adversary.record(self.queue), site


class AdversarialAccelerator:
    """One emulated device of an `Adversary`; several may share it."""

    is_on_the_clock = False
    can_plan = False
    built_in_profile: str | None = "default"

    def __init__(
        self,
        adversary: Adversary,
        name: str = "emulated:adversarial",
        *,
        capacity_bytes: int | None = None,
        faults: Faults | None = None,
    ) -> None:
        self.name, self.adversary = name, adversary
        self.device = torch.device("cpu")
        self.faults = faults or Faults()
        self._capacity_bytes, self._allocated_bytes = capacity_bytes, 0
        self._registers = adversary.random.random() < 0.5  # some drivers do, some do not
        self._released: dict[int, list[torch.Tensor]] = {}
        self.compute: Any = self.stream("compute")

    @classmethod
    def named(cls, name: str, seed: str | None) -> AdversarialAccelerator:
        """Make one whose adversary draws from `seed`."""
        return cls(Adversary(int(seed or 0)), name)

    def own_gpu_backend(self, costs: Callable[[Profile], Mapping[int, CostModel]]) -> GpuBackend | None:
        return None

    def stream(self, name: str, *, low_priority: bool = False) -> Any:
        return _Stream(self.adversary, self.adversary.queue(f"{self.name} {name}"))

    def event(self) -> Any:
        return _Event(self.adversary)

    def allocate(self, num_bytes: int) -> torch.Tensor:
        self.faults.check("allocate", "allocate")
        limit = self._capacity_bytes
        if limit is not None and self._allocated_bytes + num_bytes > limit:
            raise CapacityError(f"{num_bytes} bytes do not fit on {self.name}; give a smaller cache_size")
        self._allocated_bytes += num_bytes
        memory = self._memory(num_bytes)
        # An allocator may hand out memory that work already given to `compute` still uses.
        queue = self.compute.queue
        clock = self.adversary.submit(queue, [])
        self.adversary.detector.access(queue.who, clock, "last use of fresh memory", (), (memory,))
        return memory

    def release(self, memory: torch.Tensor) -> None:
        self._allocated_bytes -= memory.numel()
        self._released.setdefault(memory.numel(), []).append(memory)
        self.adversary.on_host("release", (), (memory,))
        memory.fill_(_POISON)

    def page_locked(self, num_bytes: int) -> torch.Tensor:
        return self._memory(num_bytes)

    def _memory(self, num_bytes: int) -> torch.Tensor:
        again = self._released.get(num_bytes)
        return again.pop() if again else torch.full((num_bytes,), _POISON, dtype=torch.uint8)

    def register(self, memory: torch.Tensor) -> object | None:
        return memory if self._registers else None

    def copy(self, stream: _Stream, target: torch.Tensor, source: torch.Tensor, site: str) -> None:
        assert target.shape == source.shape and target.dtype == source.dtype, "a copy changes neither shape nor type"
        into, out_of = target.view(-1).view(torch.uint8), source.view(-1).view(torch.uint8)
        half = len(into) // 2
        steps = [
            lambda: into.fill_(_POISON),
            lambda: into[:half].copy_(out_of[:half]),
            lambda: into[half:].copy_(out_of[half:]),
        ]
        self._enqueue("copy", stream, steps, (source,), (target,), site)

    def launch(
        self,
        stream: _Stream,
        work: Callable[[], object],
        *,
        reads: Sequence[torch.Tensor],
        writes: Sequence[torch.Tensor],
        site: str,
    ) -> None:
        self._enqueue("launch", stream, [work], reads, writes, site)

    def _enqueue(
        self,
        kind: str,
        stream: _Stream,
        steps: list[Callable[[], Any]],
        reads: Sequence[torch.Tensor],
        writes: Sequence[torch.Tensor],
        site: str,
    ) -> None:
        failure = self.faults.check(kind, site)
        if failure == "late":
            steps = [self.faults.raise_late]
        clock = self.adversary.submit(stream.queue, steps)
        self.adversary.detector.access(stream.queue.who, clock, site, reads, writes)
        if failure == "stall":
            stream.queue.is_stalled = True

    def capture(self) -> StepCapture | None:
        return Recorder()

    def replay(self, graph: StepGraph, *, reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor]) -> None:
        """Enqueue a piece, which no injected fault strikes."""
        queue = self.compute.queue
        clock = self.adversary.submit(queue, [graph.replay])
        self.adversary.detector.access(queue.who, clock, "a captured piece", reads, writes)

    def model_stream(self) -> AbstractContextManager[object]:
        return nullcontext()

    def model_works(self, work: Callable[[], object], writes: Sequence[torch.Tensor]) -> None:
        """Enqueue the model's own work on `compute`, which no injected fault strikes."""
        queue = self.compute.queue
        clock = self.adversary.submit(queue, [work])
        self.adversary.detector.access(queue.who, clock, "the model's own work", (), writes)

    def watch_cpu(self, backend: Any) -> Any:
        """Make a CPU backend's worker one more participant of this world, once."""
        return backend if isinstance(backend, WatchedCpu) else WatchedCpu(backend, self.adversary, self.faults)

    def on_host(self, site: str, *, reads: Sequence[torch.Tensor] = (), writes: Sequence[torch.Tensor] = ()) -> None:
        self.adversary.on_host(site, reads, writes)

    def hand_over(self, event: Any, wait: Callable[[Callable[[], bool], str], None]) -> None:
        wait(event.is_done, f"the experts' result on {self.name}")

    has_times = False
    stamps_are = "host clock when work is given; it is done at any time after that"

    def stamp(self, stream: Any) -> Stamp:
        return HostStamp(time.perf_counter())

    def free_bytes(self) -> int:
        if self._capacity_bytes is None:
            return host_available_bytes()
        return self._capacity_bytes - self._allocated_bytes

    def auto_budget_bytes(self, reserve_bytes: int) -> int:
        return self.free_bytes() // 2

    def describe(self) -> str:
        return "emulated, adversarial order"


class WatchedCpu(CpuBackend):
    """A CPU backend whose worker is one more participant: it computes when the adversary lets it."""

    def __init__(self, backend: Any, adversary: Adversary, faults: Faults | None = None) -> None:
        self.backend, self.name, self.answers_pairs = backend, backend.name, backend.answers_pairs
        self.spinning_threads = backend.spinning_threads
        self._adversary, self._queue = adversary, adversary.queue("CPU worker")
        self._faults = faults or Faults()
        self._answer = torch.empty(0)
        self._mark: Mark | None = None

    def describe(self) -> str:
        return str(self.backend.describe())

    def copies(self, layer: int) -> bool:
        return bool(self.backend.copies(layer))

    def add_layer(self, experts: Any) -> None:
        self.backend.add_layer(experts)

    def submit(self, layer: int, routed: Routed) -> None:
        failure = self._faults.check("cpu", "CPU experts")

        def work() -> None:
            if failure == "late":
                self._faults.raise_late()
            self.backend.submit(layer, routed)
            self._answer = self.backend.wait()

        clock = self._adversary.submit(self._queue, [work])
        answer = getattr(self.backend, "answer", None)  # backends that answer in a buffer they use again
        writes = () if answer is None else (answer,)
        self._adversary.detector.access(self._queue.who, clock, "CPU experts", routed[:3], writes)
        self._queue.is_stalled = failure == "stall"
        self._mark = self._adversary.record(self._queue)

    def is_done(self) -> bool:
        return self._adversary.host_sees(self._mark, "host: CPU experts")

    def wait(self) -> torch.Tensor:
        self._mark = None
        return self._answer
