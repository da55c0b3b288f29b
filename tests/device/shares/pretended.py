"""A device that is pretended: one queue of work, done by a thread, whose memory is the host's at other addresses."""

from __future__ import annotations

import contextlib
import ctypes
import enum
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hybrimoe_kt.device.emulated.immediate import ImmediateAccelerator

SHIFT = 1 << 40
"""From a host's address to the device's."""

Work = Callable[[], object]


class _Handle:
    def __init__(self, number: int) -> None:
        self.cuda_stream = number


class PretendedStream:
    def __init__(self, device: PretendedDevice, number: int) -> None:
        self._device, self._own = device, _Handle(number)

    @property
    def stream(self) -> _Handle:
        return self._own

    def record(self, event: Any, site: str) -> None:
        event.clear()
        self._device.enqueue(event.set)

    def wait(self, event: Any, site: str) -> None: ...


class _Current(PretendedStream):
    @property
    def stream(self) -> _Handle:
        return self._device.current


class _Event:
    def __init__(self) -> None:
        self._event = threading.Event()
        self._event.set()
        self.set, self.clear, self.is_done = self._event.set, self._event.clear, self._event.is_set


class PretendedDevice(ImmediateAccelerator):
    """Work is enqueued by whoever pretends a driver; `close` ends the thread."""

    def __init__(self, *, captures: bool = True) -> None:
        super().__init__("pretended")
        self.device = torch.device("cuda", 0)
        self.current = _Handle(0)
        self.compute = _Current(self, 0)
        self.captured: list[Work] | None = None
        self.is_over, self._captures, self._num_streams = False, captures, 0
        self._queue: queue.SimpleQueue[Work] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self.is_over:
            self._queue.get()()

    def enqueue(self, work: Work) -> None:
        if self.captured is not None:
            self.captured.append(work)
        else:
            self._queue.put(work)

    def stream(self, name: str, *, low_priority: bool = False) -> PretendedStream:
        self._num_streams += 1
        return PretendedStream(self, 100 + self._num_streams)

    def event(self) -> Any:
        return _Event()

    def launch(
        self, stream: Any, work: Work, *, reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor], site: str
    ) -> None:
        before, self.current = self.current, stream.stream
        try:
            work()
        finally:
            self.current = before

    def capture(self) -> Any:
        return _Capture(self) if self._captures else None

    def close(self) -> None:
        self.is_over = True
        self._queue.put(lambda: None)
        self._thread.join(10)
        assert not self._thread.is_alive()


class _Capture:
    def __init__(self, device: PretendedDevice) -> None:
        self._device = device

    def begin(self) -> None:
        assert self._device.captured is None
        self._device.captured = []

    def end(self) -> Any:
        works, self._device.captured = self._device.captured, None
        assert works is not None

        class Graph:
            @staticmethod
            def replay() -> None:
                for work in works:
                    self._device.enqueue(work)

        Graph.replay()
        return Graph

    def abort(self) -> None:
        self._device.captured = None


class Status(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_NOT_SUPPORTED = 801


class PretendedDriver:
    """`cuda.bindings.driver`, as far as it is called: functions answer tuples that begin with a status."""

    def __init__(
        self,
        device: PretendedDevice,
        *,
        refuses: dict[str, Status] | None = None,
        holds: bool = True,
        ends: bool = True,
    ) -> None:
        self._device, self._refuses, self._holds, self._ends = device, refuses or {}, holds, ends
        self.calls: list[tuple[Any, ...]] = []

    class CUstream(int): ...

    class CUdeviceptr(int): ...

    def cuMemHostGetDevicePointer(self, host: int, flags: int) -> tuple[Any, ...]:
        self.calls.append(("cuMemHostGetDevicePointer", host, flags))
        status = self._refuses.get("cuMemHostGetDevicePointer", Status.CUDA_SUCCESS)
        return status, self.CUdeviceptr(host + SHIFT)

    def cuStreamWaitValue32(self, stream: Any, address: Any, value: int, flags: int) -> tuple[Any, ...]:
        assert isinstance(stream, self.CUstream) and isinstance(address, self.CUdeviceptr)
        name = "cuStreamWaitValue32"
        self.calls.append((name, int(stream), int(address), value, flags, self._device.captured is not None))
        word = ctypes.c_int32.from_address(address - SHIFT)

        def wait() -> None:
            if not self._holds:
                return
            while not (self._ends and word.value == value) and not self._device.is_over:
                time.sleep(1e-4)

        if name not in self._refuses:
            self._device.enqueue(wait)
        return (self._refuses.get(name, Status.CUDA_SUCCESS),)


class PretendedRuntime:
    """The runtime library's call for functions on the host, as CUDA and HIP name it."""

    def __init__(self, device: PretendedDevice, status: int = 0) -> None:
        self._device, self._status, self.streams = device, status, list[int]()

    def cudaLaunchHostFunc(self, stream: int, function: Any, data: None) -> int:
        self.streams.append(stream)
        address = ctypes.cast(function, ctypes.c_void_p).value  # all that a graph keeps
        if self._status == 0:
            self._device.enqueue(lambda: ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)(None))
        return self._status

    hipLaunchHostFunc = cudaLaunchHostFunc


def pretended_kernel(device: PretendedDevice, *, is_hoisted: bool = False) -> Callable[..., None]:
    """What enqueues `kernels.wait_word`; hoisted, it looks once and so ends itself."""
    from hybrimoe_kt.kernels.wait_word.naive import naive_wait_word

    def launch(words: torch.Tensor, place: int, timed_out: torch.Tensor, polls: int) -> None:
        device.enqueue(lambda: naive_wait_word(words, place, timed_out, 1 if is_hoisted else polls))

    return launch


@contextlib.contextmanager
def pretended(**options: Any) -> Any:
    device = PretendedDevice(**options)
    try:
        yield device
    finally:
        device.close()
