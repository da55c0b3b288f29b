"""An accelerator whose work is done when the call returns: the same code path on a machine without a GPU."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import psutil
import torch

from hybrimoe_kt.core.cost import CostModel
from hybrimoe_kt.core.profile import Profile
from hybrimoe_kt.device.accelerator import Event, HostStamp, Stamp, Stream
from hybrimoe_kt.device.backend import CpuBackend, GpuBackend
from hybrimoe_kt.device.recorder import Recorder
from hybrimoe_kt.device.step_graph import StepCapture, StepGraph
from hybrimoe_kt.errors import CapacityError

__all__ = ["ImmediateAccelerator"]


class _Done:
    """Both stream and event of something that never waits."""

    __slots__ = ()

    def wait(self, event: Event, site: str) -> None:
        pass

    def record(self, event: Event, site: str) -> None:
        pass

    def is_done(self) -> bool:
        return True


class ImmediateAccelerator:
    """Slots in host memory, copies and kernels in program order. `--accelerator emulated`."""

    is_on_the_clock = False
    can_plan = True
    built_in_profile: str | None = "default"

    def __init__(self, name: str = "emulated") -> None:
        self.name = name
        self.device = torch.device("cpu")
        self.compute: Stream = _Done()

    def stream(self, name: str, *, low_priority: bool = False) -> Stream:
        return _Done()

    def event(self) -> Event:
        return _Done()

    def allocate(self, num_bytes: int) -> torch.Tensor:
        try:
            return torch.empty(num_bytes, dtype=torch.uint8)
        except (RuntimeError, MemoryError):
            raise CapacityError(
                f"{num_bytes / 1e9:.2f} GB for the expert cache do not fit on {self.name}; give a smaller cache_size"
            ) from None

    def own_gpu_backend(self, costs: Callable[[Profile], Mapping[int, CostModel]]) -> GpuBackend | None:
        return None

    def watch_cpu(self, backend: CpuBackend) -> CpuBackend:
        return backend

    def release(self, memory: torch.Tensor) -> None:
        memory.untyped_storage().resize_(0)

    def page_locked(self, num_bytes: int) -> torch.Tensor:
        return self.allocate(num_bytes)

    def register(self, memory: torch.Tensor) -> object | None:
        return memory

    def copy(self, stream: Stream, target: torch.Tensor, source: torch.Tensor, site: str) -> None:
        target.copy_(source)

    def launch(
        self,
        stream: Stream,
        work: Callable[[], object],
        *,
        reads: Sequence[torch.Tensor],
        writes: Sequence[torch.Tensor],
        site: str,
    ) -> None:
        work()

    def capture(self) -> StepCapture | None:
        return Recorder()

    def replay(self, graph: StepGraph, *, reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor]) -> None:
        graph.replay()

    def model_stream(self) -> AbstractContextManager[object]:
        return nullcontext()

    def on_host(self, site: str, *, reads: Sequence[torch.Tensor] = (), writes: Sequence[torch.Tensor] = ()) -> None:
        pass

    def hand_over(self, event: Event, wait: Callable[[Callable[[], bool], str], None]) -> None:
        pass

    has_times = True
    stamps_are = "host clock; work is done when it is given"

    def stamp(self, stream: Stream) -> Stamp:
        return HostStamp(time.perf_counter())

    def free_bytes(self) -> int:
        return host_available_bytes()

    def auto_budget_bytes(self, reserve_bytes: int) -> int:
        return self.free_bytes() // 2

    def describe(self) -> str:
        return "emulated"


def host_available_bytes() -> int:
    """Host memory that could be had without swapping."""
    try:
        return int(psutil.virtual_memory().available)
    except OSError:  # a Linux without /proc
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
