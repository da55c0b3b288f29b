"""Which cores one rank of an engine computes on, where several share a machine and an engine binds its threads.

Backends take as many threads as the calling thread may use cores, and threads inherit its cores. An engine that has
bound that thread to one core (vLLM's OpenMP threads are, on a CPU) would leave them all on it; two ranks that are bound
to nothing would both take the whole machine, and kt-kernel pins its threads from the first core on, whoever else does.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

__all__ = ["cores_of_rank", "on_cores"]

_TASKS = "/proc/self/task"


def cores_of_rank(rank: int, num_ranks: int) -> frozenset[int]:
    """The cores of rank `rank` among `num_ranks` on this machine; empty where the system has no such thing.

    Where this process' threads are bound, all that they are bound to is the rank's own; else the ranks share out evenly
    what the process may use, and every rank has at least one.
    """
    if not hasattr(os, "sched_getaffinity"):
        return frozenset()
    bound = {thread: frozenset(os.sched_getaffinity(thread)) for thread in _threads()}
    allowed = sorted(frozenset().union(*bound.values(), os.sched_getaffinity(0)))
    is_bound = len(bound) > 1 and any(len(cores) == 1 for cores in bound.values())
    if is_bound or num_ranks <= 1:
        return frozenset(allowed)
    begin, end = rank * len(allowed) // num_ranks, (rank + 1) * len(allowed) // num_ranks
    return frozenset(allowed[begin:end] or allowed[rank % len(allowed) : rank % len(allowed) + 1])


@contextlib.contextmanager
def on_cores(cores: frozenset[int]) -> Iterator[None]:
    """Make threads on these cores: the calling thread may use them meanwhile, what it starts stays on them."""
    if not cores:
        yield
        return
    mine, before = os.sched_getaffinity(0), _threads()
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        for thread in _threads() - before:
            if not os.sched_getaffinity(thread) <= cores:
                with contextlib.suppress(OSError):  # it has ended
                    os.sched_setaffinity(thread, cores)
        os.sched_setaffinity(0, mine)


def _threads() -> set[int]:
    try:
        return {int(name) for name in os.listdir(_TASKS)}
    except OSError:
        return set()
