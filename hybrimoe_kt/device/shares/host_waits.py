"""A stream's wait that the host does: a function that the stream calls there, or, emulated, work like any other."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch

from hybrimoe_kt.device.accelerator import Accelerator, Stream
from hybrimoe_kt.device.step_graph import opaque
from hybrimoe_kt.device.waiting import Deadline
from hybrimoe_kt.errors import DeadlineError, KernelError

from .driver_waits import stream_handle
from .probe import StreamWait, probe
from .words import SharePosts

__all__ = ["HostFunctionWaits", "SpinningWaits"]

_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class SpinningWaits:
    """Work that polls on the host, where that is where the device's work is done. Ends itself after the deadline."""

    name = "polling on the host"

    def __init__(self, deadline_s: float) -> None:
        self._deadline = Deadline(deadline_s)

    def unusable(self, accelerator: Accelerator) -> str | None:
        if accelerator.device.type != "cpu":
            return f"{accelerator.name} does its work elsewhere"
        return None

    def on(self, accelerator: Accelerator, posts: SharePosts) -> StreamWait:
        return _SpinningWait(accelerator, posts, self._deadline)


class _SpinningWait:
    name = SpinningWaits.name

    def __init__(self, accelerator: Accelerator, posts: SharePosts, deadline: Deadline) -> None:
        self._accelerator, self._posts, self._deadline = accelerator, posts, deadline

    def wait(self, stream: Stream, place: int) -> None:
        work = _polling(self._posts, place, self._deadline)
        self._accelerator.launch(
            stream, lambda: opaque(work), reads=(self._posts.done,), writes=(), site="wait for the CPU's share"
        )


class HostFunctionWaits:
    """`cudaLaunchHostFunc`, or HIP's, of the runtime library that torch has loaded; tried with a pretended library.

    The driver's own thread polls, sleeping in between and without the interpreter's lock but for each look.
    """

    name = "a function on the host"

    def __init__(self, deadline_s: float, library: Any = None) -> None:
        """`library` stands for the runtime library."""
        self._deadline, self._library = Deadline(deadline_s), library

    def unusable(self, accelerator: Accelerator) -> str | None:
        if accelerator.device.type != "cuda":
            return "CUDA's and HIP's only"
        if self._library is None:
            try:
                self._library = _runtime_library()
            except (OSError, AttributeError) as error:
                return f"torch's runtime library is not found ({error})"
        return probe(accelerator, self)

    def on(self, accelerator: Accelerator, posts: SharePosts) -> StreamWait:
        return _HostFunctionWait(self._library, posts, self._deadline)


class _HostFunctionWait:
    name = HostFunctionWaits.name

    def __init__(self, library: Any, posts: SharePosts, deadline: Deadline) -> None:
        self._launch = getattr(library, f"{_vendor()}LaunchHostFunc")
        self._callbacks = [_called(_polling(posts, place, deadline)) for place in range(len(posts.layers))]
        """Alive as long as this; what is captured calls them by address."""

    def wait(self, stream: Stream, place: int) -> None:
        status = self._launch(stream_handle(stream), self._callbacks[place], None)
        if status != 0:
            raise KernelError(f"{_vendor()}LaunchHostFunc answers {status}")


def _polling(posts: SharePosts, place: int, deadline: Deadline) -> Callable[[], None]:
    def work() -> None:
        """Return when the word is there; after the deadline, this wait's or an earlier one's, `timed_out` is set."""
        try:
            deadline.wait(lambda: posts.is_done(place) or posts.has_timed_out, "the CPU's share")
        except DeadlineError:
            posts.time_out()

    return work


def _called(work: Callable[[], None]) -> Any:
    return _CALLBACK(lambda _: work())


def _vendor() -> str:
    return "cuda" if torch.version.hip is None else "hip"


def _runtime_library() -> ctypes.CDLL:
    """The one that torch has loaded, found by its name; OSError where there is none."""
    if torch.version.hip is not None:
        library = ctypes.CDLL("libamdhip64.so")
    else:
        library = ctypes.CDLL(f"libcudart.so.{(torch.version.cuda or '').partition('.')[0]}")
    launch = getattr(library, f"{_vendor()}LaunchHostFunc")
    launch.argtypes, launch.restype = [ctypes.c_void_p, _CALLBACK, ctypes.c_void_p], ctypes.c_int
    return library
