"""What the executor expects of whatever computes experts.

Both sides see the same step: `hidden [num_tokens, hidden]`, `ids [num_tokens, top_k]` int64 where -1 means "not
yours", `weights [num_tokens, top_k]` float32. An answer is either the weighted *sum* `[num_tokens, hidden]` or, from
a backend whose results must not depend on who computed what, the weighted *pairs* `[num_tokens, top_k, hidden]`, zero
where the id is -1. Answers are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from .experts import LayerExperts
from .layout import SlotLayout

__all__ = ["CpuBackend", "GpuBackend"]


class CpuBackend(Protocol):
    """Computes experts from host memory, beside the accelerator. One call in flight at a time."""

    name: str
    answers_pairs: bool

    def add_layer(self, experts: LayerExperts) -> None:
        """Take a layer's experts; ModelError when this backend cannot run their type or shape."""

    def copies(self, layer: int) -> bool:
        """Whether it keeps a host copy of that layer's experts of its own, beside the mapped file."""

    def submit(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """Start computing; inputs (hidden float32) stay unchanged until `wait` returns.

        KernelError on input it would get wrong.
        """

    def is_done(self) -> bool:
        """Whether the submitted call has ended; never blocks."""

    def wait(self) -> torch.Tensor:
        """Return the ended call's answer, in a buffer valid until the next submit. Call it once `is_done`."""


class GpuBackend(Protocol):
    """Computes experts from their slots' bytes, on the slots' device. Everything it does is asynchronous there."""

    name: str
    answers_pairs: bool
    """Whether `out` is `[num_tokens, top_k, hidden]` (pairs) rather than `[num_tokens, hidden]` (sum)."""
    finds_routed: bool
    """Whether a launch costs what is routed and not what is in `slots`, so that all of a layer may be named."""

    def refuses(self, experts: LayerExperts) -> str | None:
        """Return why no kernel here reads these experts ("down experts are MXFP4"), None when one does."""

    def add_layer(self, experts: LayerExperts, layout: SlotLayout, memory: torch.Tensor) -> None:
        """Take note of a layer's types, shapes and slots, uint8 `[num_slots, slot_bytes]`.

        Called again for the same layer when its slots have moved. All workspace is allocated here or in `prepare`.
        """

    def prepare(self, max_tokens: int) -> None:
        """Allocate what calls of up to `max_tokens` tokens need, once, after every `add_layer`."""

    def launch(
        self,
        layer: int,
        slots: Sequence[tuple[int, int]],
        slot_of: torch.Tensor,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Enqueue the experts of `slots`, pairs (expert, slot), and *add* their answer to `out`, float32.

        `slot_of` int32 `[num_experts]` on the device says the same as `slots`, -1 elsewhere, so that kernels need no
        host decision; it and all tensors are on the slots' device. `hidden` is float32, float16 or bfloat16. Pairs of
        experts not in `slots` are left alone. Returns before anything has run; never synchronises, never allocates
        from the driver. KernelError, before any launch, for a slot out of range.
        """
