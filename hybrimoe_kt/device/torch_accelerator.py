"""CUDA, HIP and XPU through torch's generic streams and events."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from hybrimoe_kt.core.cost import CostModel
from hybrimoe_kt.core.profile import Profile
from hybrimoe_kt.errors import CapacityError, ConfigError

from .accelerator import Event, HostStamp, Stamp, Stream
from .backend import CpuBackend, GpuBackend
from .cuda_graphs import CudaCapture
from .page_locks import LOCKS, Lock, fresh_pages
from .step_graph import StepCapture, StepGraph

__all__ = ["CudaDriver", "TorchAccelerator"]

_PORTABLE, _READ_ONLY = 1, 8
"""cudaHostRegister's flags: for every device of the process; memory that is mapped read-only."""
_LARGE_BYTES = 2**26
_CLOCK_HOLDS_S = 20.0
"""Then a step of single precision is 2 us."""
_LOW_PRIORITY, _HIGH_PRIORITY = 0, -1


class _TorchEvent:
    """Recorded before anything waits on it, or waits for nothing."""

    __slots__ = ("event",)

    def __init__(self, device: torch.device) -> None:
        self.event = torch.Event(device)

    def is_done(self) -> bool:
        return bool(self.event.query())


class _TorchStream:
    __slots__ = ("_stream",)

    def __init__(self, stream: torch.Stream) -> None:
        self._stream = stream

    @property
    def stream(self) -> torch.Stream:
        return self._stream

    def wait(self, event: Any, site: str) -> None:
        self.stream.wait_event(event.event)

    def record(self, event: Any, site: str) -> None:
        self.stream.record_event(event.event)


class _CurrentStream(_TorchStream):
    """Whatever stream the model runs on at the moment of the call."""

    __slots__ = ("_device",)

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @property
    def stream(self) -> torch.Stream:
        return torch.accelerator.current_stream(self._device)


class _DeviceClock:
    """Tells events' times by a reference: one event that the host has waited for, and the time it then was."""

    def __init__(self, device: torch.device) -> None:
        self._reference = torch.Event(device, enable_timing=True)
        stream = torch.accelerator.current_stream(device)
        torch.accelerator.synchronize(device)
        stream.record_event(self._reference)
        self._reference.synchronize()
        self.read_s = time.perf_counter()

    def at_s(self, event: torch.Event) -> float:
        """When a reached event was reached."""
        return self.read_s + self._reference.elapsed_time(event) * 1e-3


class _DeviceStamp:
    __slots__ = ("_clock", "_event")

    def __init__(self, clock: _DeviceClock, event: torch.Event) -> None:
        self._clock, self._event = clock, event

    def at_s(self) -> float | None:
        return self._clock.at_s(self._event) if self._event.query() else None


class CudaDriver:
    """Page-locking through torch's own binding of the CUDA runtime; see `page_locks.Driver`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def lock(self, address: int, num_bytes: int, *, read_only: bool) -> bool:
        flags = _PORTABLE | (_READ_ONLY if read_only else 0)
        try:
            if int(torch.cuda.cudart().cudaHostRegister(address, num_bytes, flags)) == 0:
                return True
        except (RuntimeError, AttributeError, TypeError):
            pass
        with contextlib.suppress(RuntimeError):  # the refusal stays pending until a launch reports it
            torch.zeros(1, device=self._device)
        return False

    def unlock(self, address: int) -> None:
        with contextlib.suppress(RuntimeError, AttributeError, TypeError):
            torch.cuda.cudart().cudaHostUnregister(address)

    def settle(self) -> None:
        with contextlib.suppress(RuntimeError):  # a dead device copies nothing
            torch.cuda.synchronize(self._device)


class TorchAccelerator:
    """One CUDA, HIP or XPU device. Copies on their own streams need page-locked memory to be asynchronous."""

    is_on_the_clock = True
    built_in_profile: str | None = None

    def __init__(self, name: str, device: torch.device) -> None:
        self.name = name
        self._module = getattr(torch, device.type)
        index = device.index if device.index is not None else self._module.current_device()
        self.device = torch.device(device.type, index)
        self.can_plan = device.type == "cuda"
        self.compute: Stream = _CurrentStream(self.device)
        self._clock: _DeviceClock | None = None
        self._has_clock = True
        self._model_stream: torch.cuda.Stream | None = None

    @classmethod
    def named(cls, name: str) -> TorchAccelerator:
        """Make the one that torch calls `name`; ConfigError where this machine has no such device."""
        device = torch.device(name)
        available = getattr(torch, device.type)
        if not available.is_available():
            raise ConfigError(
                f"accelerator {name!r} was asked for, but torch finds none on this machine; use none or emulated"
            )
        if device.index is not None and device.index >= available.device_count():
            raise ConfigError(f"accelerator {name!r}: this machine has {available.device_count()} of them")
        return cls(name, device)

    def own_gpu_backend(self, costs: Callable[[Profile], Mapping[int, CostModel]]) -> GpuBackend | None:
        return None

    def watch_cpu(self, backend: CpuBackend) -> CpuBackend:
        return backend

    def stream(self, name: str, *, low_priority: bool = False) -> Stream:
        return _TorchStream(torch.Stream(self.device, priority=_LOW_PRIORITY if low_priority else _HIGH_PRIORITY))

    def event(self) -> Event:
        return _TorchEvent(self.device)

    def allocate(self, num_bytes: int) -> torch.Tensor:
        try:
            return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        except (torch.OutOfMemoryError, MemoryError):  # any other error is no question of size
            raise CapacityError(
                f"{num_bytes / 1e9:.2f} GB for the expert cache do not fit on {self.device}; give a smaller cache_size"
            ) from None

    def release(self, memory: torch.Tensor) -> None:
        memory.untyped_storage().resize_(0)
        self._module.empty_cache()  # in pieces it is of no use to whoever asked for it

    def page_locked(self, num_bytes: int) -> torch.Tensor:
        if num_bytes >= _LARGE_BYTES:  # torch's allocator rounds up to a power of two
            memory = fresh_pages(num_bytes, lambda pages: self._hold(pages, read_only=False))
            if memory is not None:
                return memory
        try:
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, RuntimeError) and "memory" not in str(error):
                raise  # a driver's trouble that is no question of size
            raise CapacityError(
                f"{num_bytes / 1e6:.0f} MB of host memory cannot be page-locked; raise the limit (ulimit -l) or "
                f"give --host_store mapped"
            ) from None

    def register(self, memory: torch.Tensor) -> Lock | None:
        return self._hold(memory, read_only=True)

    def _hold(self, memory: torch.Tensor, *, read_only: bool) -> Lock | None:
        if self.device.type != "cuda" or torch.version.hip is not None:
            return None
        return LOCKS.hold(CudaDriver(self.device), memory, read_only=read_only)

    def copy(self, stream: Any, target: torch.Tensor, source: torch.Tensor, site: str) -> None:
        with self._on(stream):
            target.copy_(source, non_blocking=True)

    def launch(
        self,
        stream: Any,
        work: Callable[[], object],
        *,
        reads: Sequence[torch.Tensor],
        writes: Sequence[torch.Tensor],
        site: str,
    ) -> None:
        with self._on(stream):
            work()

    def capture(self) -> StepCapture | None:
        return CudaCapture(self.device) if self.device.type == "cuda" else None

    def replay(self, graph: StepGraph, *, reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor]) -> None:
        graph.replay()

    @contextlib.contextmanager
    def model_stream(self) -> Iterator[None]:
        if self.device.type != "cuda":
            yield
            return
        if self._model_stream is None:
            self._model_stream = torch.cuda.Stream(self.device)
        own, outer = self._model_stream, torch.cuda.current_stream(self.device)
        own.wait_stream(outer)
        try:
            with torch.cuda.stream(own):
                yield
        finally:  # after an error, too: slots are given back, and the cache is made anew, behind what still runs
            outer.wait_stream(own)

    def on_host(self, site: str, *, reads: Sequence[torch.Tensor] = (), writes: Sequence[torch.Tensor] = ()) -> None:
        pass

    def hand_over(self, event: Event, wait: Callable[[Callable[[], bool], str], None]) -> None:
        pass  # the model runs on `compute`

    @property
    def has_times(self) -> bool:
        return self._has_clock

    @property
    def stamps_are(self) -> str:
        return "events of the device" if self._has_clock else "host clock when work is given: events have no times here"

    def stamp(self, stream: Any) -> Stamp:
        clock = self._running_clock()
        if clock is None:
            return HostStamp(time.perf_counter())
        event = torch.Event(self.device, enable_timing=True)
        stream.stream.record_event(event)
        return _DeviceStamp(clock, event)

    def _running_clock(self) -> _DeviceClock | None:
        """The clock, read anew now and then: it counts milliseconds in single precision. Waits for the device then."""
        if self._has_clock and (self._clock is None or time.perf_counter() - self._clock.read_s > _CLOCK_HOLDS_S):
            try:
                self._clock = _DeviceClock(self.device)
            except (RuntimeError, NotImplementedError, TypeError):
                self._has_clock = False
        return self._clock if self._has_clock else None

    def free_bytes(self) -> int:
        cached = self._module.memory_reserved(self.device) - self._module.memory_allocated(self.device)
        return int(self._module.mem_get_info(self.device)[0]) + int(cached)

    def auto_budget_bytes(self, reserve_bytes: int) -> int:
        return max(0, self.free_bytes() - reserve_bytes)

    def describe(self) -> str:
        return str(self._module.get_device_name(self.device))

    def _on(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if stream is self.compute else stream.stream
