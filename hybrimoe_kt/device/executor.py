"""Runs one frozen plan: CPU share submitted first, accelerator share beside it, then the join.

Every transfer is copied just before the first use of its slot, in plan order, so a slot that a plan uses twice
is read before it is overwritten.
"""

from __future__ import annotations

import torch

from hybrimoe_kt.core.types import Plan, Transfer

from .backend import CpuBackend, GpuBackend
from .slots import SlotPool

__all__ = ["Executor"]


class Executor:
    """Owns the order of things within a layer; knows nothing of why the plan is as it is."""

    def __init__(self, cpu: CpuBackend, gpu: GpuBackend | None, slots: SlotPool | None) -> None:
        self.cpu, self.gpu, self.slots = cpu, gpu, slots
        self._cpu_busy = False

    def start(self, plan: Plan, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor | None:
        """Submit the CPU share and run the accelerator's; returns its pairs `[num_tokens, top_k, hidden]`, if any."""
        if plan.cpu:
            self.cpu.submit(plan.layer, hidden, _only(ids, plan.cpu, everything=not plan.gpu), weights)
            self._cpu_busy = True
        return self._run_gpu(plan, hidden, ids, weights) if plan.gpu else None

    def join(self, plan: Plan, pairs: torch.Tensor | None) -> torch.Tensor:
        """Wait for the CPU share and add both; `[num_tokens, hidden]`, valid until the next submit."""
        if not plan.cpu:
            assert pairs is not None, "a plan computes at least one expert"
            return pairs.sum(dim=1)
        cpu = self.cpu.wait()
        self._cpu_busy = False
        if pairs is None:
            return cpu.sum(dim=1) if cpu.dim() == 3 else cpu
        if cpu.dim() == 3:  # pairs from both sides: each is zero where the other computed, so adding is exact
            return (pairs + cpu.to(pairs.device)).sum(dim=1)
        return pairs.sum(dim=1).add_(cpu.to(pairs.device))

    def abandon(self) -> None:
        """Let a submitted CPU share end and forget it, after something else of the step has failed."""
        if self._cpu_busy:
            self.cpu.wait()
            self._cpu_busy = False

    def _run_gpu(self, plan: Plan, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        assert self.gpu is not None and self.slots is not None, "a plan without an accelerator runs on the CPU"
        device = self.slots.accelerator.device
        hidden, ids, weights = hidden.to(device), ids.to(device), weights.to(device)
        pairs = hidden.new_zeros(*ids.shape, hidden.shape[1])
        arriving = {transfer.expert.index: transfer for transfer in plan.transfers}
        for index in plan.gpu:
            if index in arriving:
                self.slots.fill(arriving[index])
            slot = self.slots.bytes_of(plan.layer, plan.slots[index])
            self.gpu.compute(plan.layer, {index: slot}, hidden, ids, weights, pairs)
        return pairs

    def transfer(self, transfers: tuple[Transfer, ...]) -> None:
        """Bring experts into their slots ahead of need."""
        for transfer in transfers:
            assert self.slots is not None, "no accelerator, no transfers"
            self.slots.fill(transfer)


def _only(ids: torch.Tensor, experts: tuple[int, ...], *, everything: bool) -> torch.Tensor:
    """Return `ids` with every expert that is not in `experts` replaced by -1."""
    if everything:
        return ids
    mine = torch.tensor(experts, dtype=ids.dtype, device=ids.device)
    return torch.where(torch.isin(ids, mine), ids, -1)
