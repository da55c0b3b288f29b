"""Reference of the word that copies are through."""

from __future__ import annotations

import torch

from hybrimoe_kt.kernels.plan_tables import PlanTables

__all__ = ["naive_land"]


def naive_land(copies: torch.Tensor, tables: PlanTables, place: int = 0) -> None:
    """Say that `copies` are through; arguments as of `land`."""
    for *layer, expert, slot, number in copies.tolist():
        if expert >= 0:
            tables.parts["landed"][layer[0] if layer else place, slot] = number
