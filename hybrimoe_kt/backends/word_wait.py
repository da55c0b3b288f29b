"""The kernel by which a stream waits for a word, for `device.shares.stream_waits`, which lies below kernels."""

from __future__ import annotations

from hybrimoe_kt.device.shares.stream_waits import LaunchWait

__all__ = ["word_wait"]


def word_wait() -> LaunchWait | None:
    """What enqueues the kernel on the current stream; None without Triton."""
    try:
        from hybrimoe_kt.kernels.wait_word import wait_word
    except ImportError:
        return None
    launch: LaunchWait = wait_word
    return launch
