"""How a stream waits for a word that the host writes, in captured work and outside.

`choose_wait` takes the first of several ways that a probe finds to work on the device at hand:

1. the driver's own wait for a value in memory, which no core of the device polls (CUDA, needs cuda-bindings);
2. a kernel of one warp that polls, see `kernels.wait_word`: the way of HIP, where torch's page-locked memory is
   coherent, so that a load sees what the host has written;
3. a function that the stream calls on the host, and that returns when the word is there.

On emulated accelerators it is work that polls on the host. No device has run ways 1 to 3 yet: they are tested
with a driver, a kernel and a runtime library that are pretended.

While a stream waits by way 1, streams that share its hardware queue may stand behind it; none of them is needed for
the word, so that this costs time at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from hybrimoe_kt.device.accelerator import Accelerator

from .driver_waits import DriverWaits
from .host_waits import HostFunctionWaits, SpinningWaits
from .kernel_waits import KernelWaits, LaunchWait
from .probe import StreamWait, StreamWaits
from .words import SharePosts

__all__ = ["ChosenWait", "LaunchWait", "StreamWait", "StreamWaits", "choose_wait"]


class ChosenWait(NamedTuple):
    """How to wait, if at all, and why the ways before it were not taken."""

    wait: StreamWait | None
    reasons: tuple[str, ...]


def choose_wait(
    accelerator: Accelerator,
    posts: SharePosts,
    *,
    launch: LaunchWait | None = None,
    deadline_s: float = 60.0,
    ways: Sequence[StreamWaits] | None = None,
) -> ChosenWait:
    """The first of `ways`, by default of those that the module names, that works on this device.

    `launch` enqueues the kernel, which lies in a layer above this one. `deadline_s` is when a wait that can ends
    itself, and so says in `timed_out`.
    """
    if ways is None:
        if accelerator.device.type == "cpu":
            ways = [SpinningWaits(deadline_s)]
        else:
            ways = [DriverWaits(), KernelWaits(launch, deadline_s), HostFunctionWaits(deadline_s)]
    reasons: list[str] = []
    for way in ways:
        reason = way.unusable(accelerator)
        if reason is None:
            return ChosenWait(way.on(accelerator, posts), tuple(reasons))
        reasons.append(f"{way.name}: {reason}")
    return ChosenWait(None, tuple(reasons))
