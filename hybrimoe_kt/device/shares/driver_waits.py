"""A stream's wait by the driver's own memory operations: `cuStreamWaitValue32`, a node of a graph where captured."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from hybrimoe_kt.device.accelerator import Accelerator, Stream
from hybrimoe_kt.errors import KernelError

from .probe import StreamWait, probe
from .words import SharePosts

__all__ = ["DriverWaits", "stream_handle"]

_EQUAL = 1
"""CU_STREAM_WAIT_VALUE_EQ."""


def stream_handle(stream: Any) -> int:
    """The driver's own handle of a stream of `TorchAccelerator`, whichever it stands for at the moment."""
    handle = getattr(stream.stream, "cuda_stream", None)
    return int(stream.stream.native_handle if handle is None else handle)


class DriverWaits:
    """CUDA's. No core of the device polls, and nothing bounds the wait but the host. Tried with a pretended driver."""

    name = "the driver's wait for a value in memory"

    def __init__(self, driver: Any = None) -> None:
        """`driver` stands for the module `cuda.bindings.driver`."""
        self._driver = driver

    def unusable(self, accelerator: Accelerator) -> str | None:
        if accelerator.device.type != "cuda" or torch.version.hip is not None:
            return "CUDA's only"
        if self._driver is None:
            try:
                self._driver = importlib.import_module("cuda.bindings.driver")
            except ImportError as error:
                return f"needs cuda-bindings ({error}); install hybrimoe-kt[cuda-bindings]"
        return probe(accelerator, self)

    def on(self, accelerator: Accelerator, posts: SharePosts) -> StreamWait:
        """KernelError where the driver knows no address of the memory."""
        return _DriverWait(self._driver, posts)


class _DriverWait:
    name = DriverWaits.name

    def __init__(self, driver: Any, posts: SharePosts) -> None:
        self._driver, self._posts = driver, posts
        # of all of the memory, whose address the driver itself has given out
        first = self._checked("cuMemHostGetDevicePointer", driver.cuMemHostGetDevicePointer(posts.memory.data_ptr(), 0))
        self._address = int(first) + posts.done.data_ptr() - posts.memory.data_ptr()

    def wait(self, stream: Stream, place: int) -> None:
        driver, posts = self._driver, self._posts
        assert 0 <= place < len(posts.layers), f"{place} is no place of {len(posts.layers)} layers"
        address = driver.CUdeviceptr(self._address + place * posts.done.element_size())
        handle = driver.CUstream(stream_handle(stream))
        self._checked("cuStreamWaitValue32", driver.cuStreamWaitValue32(handle, address, 1, _EQUAL))

    @staticmethod
    def _checked(call: str, answer: tuple[Any, ...]) -> Any:
        """What a call of the bindings answers behind its status."""
        status, *rest = answer
        if int(status) != 0:
            raise KernelError(f"{call} answers {getattr(status, 'name', status)}")
        return rest[0] if rest else None
