"""Reference of the wait."""

from __future__ import annotations

import torch

__all__ = ["naive_wait_word"]


def naive_wait_word(words: torch.Tensor, place: int, timed_out: torch.Tensor, polls: int) -> None:
    """Look at `words[place]`, int32, until it is 1, `polls` times at most; then set `timed_out`, int32 `[1]`, to 1.

    Where `timed_out` is set before, it looks once.
    """
    limit = 1 if int(timed_out[0]) else max(polls, 1)
    for _ in range(limit):
        if int(words[place]) == 1:
            return
    timed_out[0] = 1
