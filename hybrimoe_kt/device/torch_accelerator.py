"""CUDA, HIP and XPU through torch's generic streams and events."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hybrimoe_kt.errors import CapacityError

from .accelerator import Event, Stream

__all__ = ["RESERVE_BYTES", "TorchAccelerator"]

RESERVE_BYTES = 2**30
"""Left free by `auto`: activations, KV cache growth and the libraries' own buffers. An assumption, not measured."""

_HOST_REGISTER_READ_ONLY = 8  # cudaHostRegisterReadOnly: the mapping of a file that is not writable
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


class TorchAccelerator:
    """One CUDA, HIP or XPU device. Copies on their own streams need page-locked memory to be asynchronous."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.name = name
        self._module = getattr(torch, device.type)
        index = device.index if device.index is not None else self._module.current_device()
        self.device = torch.device(device.type, index)
        self.compute: Stream = _CurrentStream(self.device)

    def stream(self, name: str, *, low_priority: bool = False) -> Stream:
        return _TorchStream(torch.Stream(self.device, priority=_LOW_PRIORITY if low_priority else _HIGH_PRIORITY))

    def event(self) -> Event:
        return _TorchEvent(self.device)

    def allocate(self, num_bytes: int) -> torch.Tensor:
        try:
            return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        except (torch.OutOfMemoryError, RuntimeError, MemoryError):
            raise CapacityError(
                f"{num_bytes / 1e9:.2f} GB for the expert cache do not fit on {self.device}; give a smaller cache_size"
            ) from None

    def release(self, memory: torch.Tensor) -> None:
        memory.untyped_storage().resize_(0)

    def page_locked(self, num_bytes: int) -> torch.Tensor:
        try:
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        except (RuntimeError, MemoryError):
            raise CapacityError(
                f"{num_bytes / 1e6:.0f} MB of host memory cannot be page-locked; raise the limit (ulimit -l) or "
                f"give --host_store mapped"
            ) from None

    def register(self, memory: torch.Tensor) -> bool:
        if self.device.type != "cuda" or torch.version.hip is not None:
            return False
        page = 4096
        start = memory.data_ptr() // page * page
        num_bytes = -(-(memory.data_ptr() + memory.numel() - start) // page) * page
        try:
            return int(torch.cuda.cudart().cudaHostRegister(start, num_bytes, _HOST_REGISTER_READ_ONLY)) == 0
        except (RuntimeError, AttributeError, ctypes.ArgumentError):
            return False

    def copy(self, stream: Any, target: torch.Tensor, source: torch.Tensor, site: str) -> None:
        with self._on(stream):
            target.copy_(source, non_blocking=True)

    def launch(
        self,
        stream: Any,
        work: Callable[[], None],
        *,
        reads: Sequence[torch.Tensor],
        writes: Sequence[torch.Tensor],
        site: str,
    ) -> None:
        with self._on(stream):
            work()

    def on_host(self, site: str, *, reads: Sequence[torch.Tensor] = (), writes: Sequence[torch.Tensor] = ()) -> None:
        pass

    def hand_over(self, event: Event, wait: Callable[[Callable[[], bool], str], None]) -> None:
        pass  # the model runs on `compute`

    def free_bytes(self) -> int:
        return int(self._module.mem_get_info(self.device)[0])

    def auto_budget_bytes(self) -> int:
        return max(0, self.free_bytes() - RESERVE_BYTES)

    def describe(self) -> str:
        return str(self._module.get_device_name(self.device))

    def _on(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if stream is self.compute else stream.stream
