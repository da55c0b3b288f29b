"""A stream's wait for a word that the host writes, as a kernel: for devices whose driver does not wait by itself."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["wait_word", "wait_word_kernel"]


@triton.jit
def wait_word_kernel(words, place, timed_out, polls):
    """One program, whose threads all load the same address.

    The loads go past every cache that the host does not write through to: `ld.volatile` on NVIDIA, at system scope by
    its cache bits on AMD, where Triton heeds `.cv` alone: a load that is only volatile is hoisted there, and the loop
    is gone. There is no read-modify-write, which could undo what the host writes meanwhile.
    """
    word = words + place
    left = tl.where(tl.load(timed_out, cache_modifier=".cv", volatile=True) == 0, polls, 1)
    seen = tl.load(word, cache_modifier=".cv", volatile=True)
    while (seen != 1) & (left > 1):
        seen = tl.load(word, cache_modifier=".cv", volatile=True)
        left -= 1
    tl.store(timed_out, 1, mask=seen != 1)


def wait_word(words: torch.Tensor, place: int, timed_out: torch.Tensor, polls: int) -> None:
    """Enqueue a wait until `words[place]` is 1, which ends itself after `polls` looks and sets `timed_out` then.

    `words` int32 and `timed_out` int32 `[1]` in page-locked memory that the device sees the host's writes in: torch's
    is, on HIP as well. Where `timed_out` is set already, one look is taken: of a token that is lost, the rest of the
    waits end at once. A look crosses the link, a microsecond or two; `polls` is below 2^31.
    """
    wait_word_kernel[(1,)](words, place, timed_out, polls, num_warps=1)
