"""kt-kernel's extension and its one pool of threads; nothing else in the package imports kt_kernel.

Numbers marked [m] were measured on a 2-core AVX2 machine with kt-kernel 0.7.2.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
from collections.abc import Iterator
from typing import Any

from hybrimoe_kt.device.cores import physical_cores
from hybrimoe_kt.errors import HostCompatibilityError

__all__ = ["extension", "stdout_silenced", "unusable", "worker_pool"]

_NICE = 3


@functools.cache
def extension() -> Any:
    """The low-level extension; HostCompatibilityError where kt-kernel is missing or another version."""
    try:
        import kt_kernel
    except ImportError as error:
        raise HostCompatibilityError(
            f"the llamafile CPU backend needs kt-kernel 0.7.2 ({error}); install it with "
            f"`pip install --no-deps kt-kernel==0.7.2`, or use --cpu_backend ggml"
        ) from None
    library = kt_kernel.kt_kernel_ext
    if not hasattr(library, "moe") or not hasattr(library.moe, "MOE"):
        raise HostCompatibilityError(
            f"kt-kernel {getattr(kt_kernel, '__version__', '?')} has no llamafile MOE; version 0.7.2 has"
        )
    return library


def unusable() -> str | None:
    """Return why this backend cannot run here, None when kt-kernel imports and has the kernels."""
    try:
        extension()
    except HostCompatibilityError as error:
        return str(error)
    return None


@functools.cache
def worker_pool(num_threads: int) -> Any:
    """One pool a process: its threads are pinned and spin for 50 ms after a job, so two would fight."""
    library = extension()
    config = library.WorkerPoolConfig()
    config.subpool_count = 1  # one subpool reads weights in place; two copy them
    config.subpool_numa_map = [0]
    config.subpool_thread_count = [num_threads]
    before = _threads()
    with stdout_silenced():
        pool = library.CPUInfer(config)
    if num_threads + 1 >= physical_cores():
        _give_way(_threads() - before)
    # Never destroyed: its destructor prints to standard output when the interpreter exits.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(pool))
    return pool


def _threads() -> set[int]:
    """The ids of this process's threads; empty where the system does not list them."""
    try:
        return {int(name) for name in os.listdir("/proc/self/task")}
    except OSError:
        return set()


def _give_way(threads: set[int]) -> None:
    """Let the pool's threads yield their core to whoever hands them work.

    They spin for 50 ms after each call. Where they and their queue's thread fill the machine, a thread that had slept
    a moment and went on to plan the next layer lost its core to a spinning one for 2.4 ms, in one layer out of three
    [m]. A little is enough; more would starve them beside other programs.
    """
    for thread in threads:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, _NICE)


@contextlib.contextmanager
def stdout_silenced() -> Iterator[None]:
    """Hide what kt-kernel's C++ prints, at the level of the file descriptor: Python never sees it."""
    sys.stdout.flush()
    saved = os.dup(1)
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 1)
        yield
    finally:
        _flush_c_streams()
        os.dup2(saved, 1)
        os.close(saved)


def _flush_c_streams() -> None:
    ctypes.CDLL(None).fflush(None)
