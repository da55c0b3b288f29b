"""What the executor expects of whatever computes experts.

Both sides see the same step: `hidden [num_tokens, hidden]` float32, `ids [num_tokens, top_k]` int64 where -1
means "not yours", `weights [num_tokens, top_k]` float32. An answer is either the weighted *sum*
`[num_tokens, hidden]` or, from a backend whose results must not depend on who computed what, the weighted
*pairs* `[num_tokens, top_k, hidden]`, zero where the id is -1. All float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from .host_store import LayerExperts

__all__ = ["CpuBackend", "GpuBackend"]


class CpuBackend(Protocol):
    """Computes experts from host memory, beside the accelerator. One call in flight at a time."""

    name: str

    def add_layer(self, experts: LayerExperts) -> None:
        """Take a layer's experts; ModelError when this backend cannot run their type or shape."""

    def submit(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """Start computing; inputs stay unchanged until `wait` returns. KernelError on input it would get wrong."""

    def wait(self) -> torch.Tensor:
        """Block until the submitted call is done; the returned buffer is valid until the next submit."""


class GpuBackend(Protocol):
    """Computes experts from their slots' bytes, on the slots' device."""

    name: str

    def add_layer(self, experts: LayerExperts) -> None:
        """Take note of a layer's types and shapes; ModelError when no kernel reads them."""

    def compute(
        self,
        layer: int,
        slots: Mapping[int, torch.Tensor],
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        pairs: torch.Tensor,
    ) -> None:
        """Write the pairs of the experts in `slots` (expert -> uint8 `[expert_bytes]`) into `pairs`, leave the rest."""
