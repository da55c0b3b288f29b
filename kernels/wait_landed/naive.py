"""Reference of the waiting."""

from __future__ import annotations

import torch

from hybrimoe_kt.kernels.plan_configs import WaitConfig
from hybrimoe_kt.kernels.plan_tables import ARRIVING, LayerRow, PlanForm

__all__ = ["naive_wait_landed"]


def naive_wait_landed(row: LayerRow, form: PlanForm, timed_out: torch.Tensor, config: WaitConfig) -> None:
    """Return once all that arrive have landed; arguments as of `wait_landed`."""
    doing = row.record[form.top_k : 2 * form.top_k]
    slots = row.record[2 * form.top_k : 3 * form.top_k][doing == ARRIVING].long()
    wanted = row.issued[slots]
    for _ in range(config.polls):
        if bool((row.landed[slots] >= wanted).all()):
            return
    timed_out += 1
