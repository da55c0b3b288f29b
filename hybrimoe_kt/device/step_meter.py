"""What a hybrid layer step really takes: CPU experts beside the host's own work, which both want the same cores.

Steps are run as in a model, so that what is measured includes reading the routing, planning, enqueuing and joining,
and, on a machine with few cores, what all that takes from the CPU experts.
"""

from __future__ import annotations

import random
import time

import torch

from hybrimoe_kt.core.coordinator import Coordinator
from hybrimoe_kt.core.cost import CostModel
from hybrimoe_kt.core.strategy import Strategy
from hybrimoe_kt.core.types import LayerSpec, Routing

from .accelerator import Accelerator
from .backend import CpuBackend, GpuBackend, Routed
from .executor import Executor
from .host_store import HostStore
from .lane import Lane
from .measure import Sample
from .waiting import Deadline

__all__ = ["StepMeter"]

_CLEARLY = 1.3
"""How much longer the CPU share must take than the GPU's, for the step to end with it."""


class StepMeter:
    """Decode steps of one layer, `pause_s` apart: half the experts in slots, enough of the others on the CPU."""

    def __init__(
        self,
        accelerator: Accelerator,
        cpu: CpuBackend,
        gpu: GpuBackend,
        store: HostStore,
        layer: int,
        cost: CostModel,
        *,
        pause_s: float,
        deadline: Deadline,
    ) -> None:
        """`cpu` has taken the layer already."""
        experts = store.layers[layer]
        self._experts, self._cost, self._pause_s = experts, cost, pause_s
        self._device, self._random = accelerator.device, random.Random(0)
        self._num_slots = max(1, min(experts.top_k, experts.num_experts // 2))
        lane = Lane(
            accelerator, gpu, store, {layer: self._num_slots},
            max_tokens=1, cpu_answers_pairs=cpu.answers_pairs, chunk_bytes=2**20, deadline=deadline,
        )  # fmt: skip
        self._lane, self._executor = lane, Executor(cpu, [lane], deadline)
        spec = LayerSpec(layer, experts.num_experts, experts.top_k, experts.expert_bytes, self._num_slots)
        self._coordinator = Coordinator([spec], cost, Strategy(scheduler="static", prefetch_size=0))
        for transfer in self._coordinator.initial_transfers():
            self._executor.fill(transfer)

    @property
    def least_on_cpu(self) -> int:
        """The least number of CPU experts with which the CPU clearly ends last."""
        top_k, cost = self._experts.top_k, self._cost
        for num in range(1, top_k):
            if cost.cpu_s([1] * num) > _CLEARLY * (top_k - num) * cost.gpu_s(1):
                return num
        return top_k

    def step(self, num_on_cpu: int, repeats: int) -> Sample:
        """Seconds of a step with so many experts on the CPU, the others of its top-k on the accelerator."""
        return Sample.repeat(repeats, lambda number: self._step(num_on_cpu))

    def _step(self, num_on_cpu: int) -> float:
        experts, slots = self._experts, self._num_slots
        chosen = self._random.sample(range(slots, experts.num_experts), num_on_cpu)
        chosen += self._random.sample(range(slots), min(slots, experts.top_k - num_on_cpu))
        ids = torch.tensor([chosen], device=self._device)
        weights = torch.full(ids.shape, 1.0 / len(chosen), device=self._device)
        hidden = torch.zeros(1, experts.hidden, device=self._device)
        time.sleep(self._pause_s)
        began = time.perf_counter()
        step = self._lane.read(Routed(hidden, ids, weights))
        plan = self._coordinator.plan(Routing(experts.layer, dict.fromkeys(step.host.ids[0].tolist(), 1)))
        self._executor.start(plan, step)
        result = self._executor.join(plan, step)
        if result.device.type != "cpu":
            torch.accelerator.synchronize()
        seconds = time.perf_counter() - began
        self._coordinator.finish(plan)
        return seconds
