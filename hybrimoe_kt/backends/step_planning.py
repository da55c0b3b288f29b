"""The kernels that plan a token's step on a device, behind one door: Triton's, or their references in torch."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from functools import partial

import torch

from hybrimoe_kt.core.device_rules import DeviceRules, LayerTables
from hybrimoe_kt.device.step_graph import opaque
from hybrimoe_kt.kernels.plan_configs import fetch_config, plan_config, wait_config
from hybrimoe_kt.kernels.plan_tables import LRU, MRS, PlanForm, PlanTables, Posted, SlotAddresses, StepOutputs

from .gpu_triton import target_of

__all__ = ["Posted", "StepPlanning"]

_PARTS = ("slot_of", "expert_of", "scores", "issued", "landed", "counts")
_COUNTED = ("visits", "totals", "hits", "misses")


class StepPlanning:
    """One accelerator's layers, by place: the tables that kernels read and write, and what launches them.

    Every launch only enqueues on the current stream, and can be captured. Where the device is a CPU they are the
    references, or the kernels in Triton's interpreter if that is on and `interprets`.
    """

    def __init__(
        self,
        device: torch.device,
        rules: DeviceRules,
        *,
        num_experts: int,
        top_k: int,
        num_slots: Sequence[int],
        class_of: Sequence[int],
        interprets: bool = False,
    ) -> None:
        policy = MRS if rules.policy == "mrs" else LRU
        self.form = PlanForm(
            num_experts, top_k, policy, rules.alpha, rules.kept(num_experts, top_k), rules.bypass,
            rules.prefetch_size, rules.admission,
        )  # fmt: skip

        def allocate(num_values: int) -> torch.Tensor:
            return torch.empty(num_values, dtype=torch.int32, device=device)

        self.tables = PlanTables(self.form, list(num_slots), list(class_of), allocate)
        tables = [allocate(num_experts).fill_(-1) for _ in range(2)]
        copies = allocate(3 * top_k).fill_(-1).view(top_k, 3)
        self.outputs = StepOutputs(*tables, copies, allocate(1).zero_())
        """Valid from the start: nothing is brought, and nobody computes."""
        self.ahead = [
            torch.full((max(1, rules.prefetch_size), 4), -1, dtype=torch.int32, device=device) for _ in num_slots
        ]
        """What `look_ahead` has ordered, by place of the layer that asked."""
        self._addresses: SlotAddresses | None = None
        self._counted = {name: torch.zeros_like(self.tables.parts[name], device="cpu") for name in _COUNTED}
        self._device, self._target = device, target_of(device)
        self._is_naive = device.type == "cpu" and not (interprets and os.environ.get("TRITON_INTERPRET") == "1")

    # What kernels read.

    def state(self, place: int) -> tuple[torch.Tensor, ...]:
        """What planning a layer reads and writes of it, but for `landed`, which is written beside that."""
        row = self.tables.rows[place]
        counted = row.visits, row.totals, row.hits, row.misses
        return row.slot_of, row.expert_of, row.scores, row.issued, row.counts, row.record, *counted

    def set_table(self, number: int, packed: Sequence[int], gains_ns: Sequence[int]) -> None:
        """Have the layers of a class follow another decision table; on the current stream."""
        self.tables.tables[number].copy_(torch.tensor(packed, dtype=torch.int32))
        self.tables.gains[number].copy_(torch.tensor(gains_ns, dtype=torch.int32))

    def set_addresses(self, sources: Sequence[int], targets: Sequence[int], slot_bytes: Sequence[int]) -> None:
        """Where experts lie and where they go, by place."""
        parts = (torch.tensor(part, dtype=torch.int64, device=self._device) for part in (sources, targets, slot_bytes))
        self._addresses = SlotAddresses(*parts)

    def upload(self, layers: Sequence[LayerTables]) -> None:
        """Go on from these, one by place; no copy is under way."""
        for name in _PARTS:
            part = self.tables.parts[name]
            whole = torch.zeros(part.shape, dtype=torch.int32)
            for row, layer in zip(whole, layers, strict=True):
                values = [layer.clock, layer.num_copies] if name == "counts" else getattr(layer, name)
                row[: len(values)] = torch.tensor(values, dtype=torch.int32)
            part.copy_(whole)

    def download(self) -> list[LayerTables]:
        """What the device has made of them, by place; waits for it, and takes copies to be through."""
        parts = {name: self.tables.parts[name].tolist() for name in _PARTS}
        found = []
        for place, num_slots in enumerate(self.tables.num_slots):
            clock, num_copies = parts["counts"][place]
            by_slot = [parts[name][place][:num_slots] for name in ("expert_of", "issued", "issued")]
            expert_of, issued, landed = by_slot
            slot_of, scores = parts["slot_of"][place], parts["scores"][place]
            found.append(LayerTables(slot_of, expert_of, scores, issued, list(landed), clock, num_copies))
        return found

    def counted(self) -> dict[str, list[list[int]]]:
        """How much each of the device's counters has grown since the last call, by name and place."""
        found = {}
        for name in _COUNTED:
            now = self.tables.parts[name].to("cpu", copy=True)
            found[name] = (now - self._counted[name]).tolist()
            self._counted[name] = now
        return found

    # What is launched.

    def plan(
        self, place: int, ids: torch.Tensor, weights: torch.Tensor, probabilities: torch.Tensor, hidden: torch.Tensor,
        posted: Posted,
    ) -> None:  # fmt: skip
        """Decide a step of one token: ids int64, weights float32 `[top_k]`, probabilities float32 `[num_experts]`."""
        given = self.tables.rows[place], self.form, ids, weights, probabilities, hidden, self.outputs, posted
        self._launch("plan_step", *given, config=plan_config(self._target, self.form.num_experts))

    def look_ahead(self, place: int, ids: torch.Tensor) -> None:
        """Order copies for the layers after `place`, whose gates guess `ids` int64 `[num_later, top_k]`, and for it."""
        given = self.tables, place, len(ids), ids, self.ahead[place]
        self._launch("look_ahead", *given, config=plan_config(self._target, self.form.num_experts))

    def fetch(self, place: int, copies: torch.Tensor) -> None:
        """Bring experts into slots: `[n, 3]` of the layer at `place`, or `[n, 4]` of layers that the copies name."""
        assert self._addresses is not None, "set before"
        self._launch("fetch", copies, self._addresses, place=place, config=fetch_config(self._target))

    def land(self, place: int, copies: torch.Tensor) -> None:
        """Note that these are through; behind `fetch`, on its stream."""
        self._launch("land", copies, self.tables, place=place)

    def wait_landed(self, place: int, timed_out: torch.Tensor) -> None:
        """Wait for what arrives in the layer's step; `timed_out` int32 `[1]` grows where that takes too long."""
        self._launch("wait_landed", self.tables.rows[place], self.form, timed_out, wait_config(self._target))

    def _launch(self, op: str, *given: object, **named: object) -> None:
        """Launch a kernel, or do what it is held to, which has no launch shape."""
        name = f"naive_{op}" if self._is_naive else op
        if self._is_naive:
            named.pop("config", None)
        module = importlib.import_module(f"hybrimoe_kt.kernels.{op}.{'naive' if self._is_naive else 'kernel'}")
        opaque(partial(getattr(module, name), *given, **named))
