"""A stream's wait by a kernel that polls the word: needs nothing of the driver, and ends itself after a while."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hybrimoe_kt.device.accelerator import Accelerator, Stream

from .probe import StreamWait, probe
from .words import SharePosts

__all__ = ["KernelWaits", "LaunchWait"]

LaunchWait = Callable[[torch.Tensor, int, torch.Tensor, int], None]
"""`kernels.wait_word`: words, place, the word that says that time is up, and how many looks to take at most."""
_POLLS_PER_S = 1e6
"""A look crosses the link and back: about a microsecond. Assumed, not measured."""
_MOST_POLLS = 2**31 - 1
_TRIAL_S = 2.0


class KernelWaits:
    """Any device that Triton compiles for; the way of HIP. Tried in Triton's interpreter and with a pretended launch.

    The kernel keeps one warp of the device busy, so that a kernel of another stream that needs all cores at once would
    stand behind it; none of ours does.
    """

    name = "a kernel that polls"

    def __init__(self, launch: LaunchWait | None, deadline_s: float) -> None:
        self._launch, self._deadline_s = launch, deadline_s

    def unusable(self, accelerator: Accelerator) -> str | None:
        if accelerator.device.type == "cpu":
            return f"{accelerator.name} runs no kernels beside the host"
        if self._launch is None:
            return "needs Triton; install hybrimoe-kt[cuda]"
        return probe(accelerator, KernelWaits(self._launch, min(self._deadline_s, _TRIAL_S)))

    def on(self, accelerator: Accelerator, posts: SharePosts) -> StreamWait:
        assert self._launch is not None, "usable"
        polls = min(max(1, int(self._deadline_s * _POLLS_PER_S)), _MOST_POLLS)
        return _KernelWait(accelerator, posts, self._launch, polls)


class _KernelWait:
    name = KernelWaits.name

    def __init__(self, accelerator: Accelerator, posts: SharePosts, launch: LaunchWait, polls: int) -> None:
        self._accelerator, self._posts, self._launch, self._polls = accelerator, posts, launch, polls

    def wait(self, stream: Stream, place: int) -> None:
        posts = self._posts
        self._accelerator.launch(
            stream,
            lambda: self._launch(posts.done, place, posts.timed_out, self._polls),
            reads=(posts.done,),
            writes=(posts.timed_out,),
            site="wait for the CPU's share",
        )
