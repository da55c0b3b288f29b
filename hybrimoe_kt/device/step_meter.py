"""What a layer step costs beside its experts: reading the routing, planning, enqueuing, joining."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import torch

from hybrimoe_kt.core.coordinator import Coordinator
from hybrimoe_kt.core.cost import CostModel
from hybrimoe_kt.core.types import LayerSpec, Routing

from .accelerator import Accelerator
from .backend import GpuBackend
from .executor import Executor
from .host_store import HostStore, LayerExperts
from .lane import Lane
from .measure import Sample
from .waiting import Patience

__all__ = ["StepMeter"]


class _FreeCpu:
    """Answers zeros at once."""

    name, answers_pairs = "free", False

    def __init__(self, hidden: int) -> None:
        self._answer = torch.zeros(1, hidden)

    def add_layer(self, experts: LayerExperts) -> None:
        """Nothing to take."""

    def copies(self, layer: int) -> bool:
        return False

    def submit(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """Nothing to do."""

    def is_done(self) -> bool:
        return True

    def wait(self) -> torch.Tensor:
        return self._answer


class StepMeter:
    """Decode steps of one layer whose CPU experts cost nothing, `pause_s` apart, as a model's layers are."""

    def __init__(
        self,
        accelerator: Accelerator,
        gpu: GpuBackend,
        store: HostStore,
        layer: int,
        cost: CostModel,
        *,
        num_slots: int,
        pause_s: float,
        patience: Patience,
        use_cpu: Callable[[], object],
    ) -> None:
        """`use_cpu` is called before every step: a CPU backend whose threads spin after a call takes cores from it."""
        self._experts, self._pause_s, self._use_cpu = store.layers[layer], pause_s, use_cpu
        self._device, self._random = accelerator.device, random.Random(0)
        experts = self._experts
        lane = Lane(
            accelerator, gpu, store, {layer: num_slots},
            max_tokens=1, cpu_answers_pairs=False, chunk_bytes=2**20, patience=patience,
        )  # fmt: skip
        self._executor = Executor(_FreeCpu(experts.hidden), [lane], patience)
        spec = LayerSpec(layer, experts.num_experts, experts.top_k, experts.expert_bytes, num_slots)
        self._coordinators = {
            name: Coordinator([spec], cost, scheduler=name, prefetch_size=0) for name in ("static", "cpu_only")
        }
        for transfer in self._coordinators["static"].initial_transfers():
            self._executor.fill(transfer)

    def overhead(self, repeats: int) -> Sample:
        """Seconds until a hybrid step's work is under way, and from the end of the CPU share to the answer."""
        return Sample.repeat(repeats, lambda number: self._step("static")[0] + self._step("cpu_only")[1])

    def _step(self, scheduler: str) -> tuple[float, float]:
        """Run one step; return what passed until everything was enqueued, and from then on."""
        experts, coordinator = self._experts, self._coordinators[scheduler]
        chosen = self._random.sample(range(experts.num_experts), experts.top_k)
        ids = torch.tensor([chosen], device=self._device)
        weights = torch.full(ids.shape, 1.0 / experts.top_k, device=self._device)
        hidden = torch.zeros(1, experts.hidden, device=self._device)
        self._use_cpu()
        time.sleep(self._pause_s)
        began = time.perf_counter()
        step = self._executor.read(experts.layer, hidden, ids, weights)
        plan = coordinator.plan(Routing(experts.layer, dict.fromkeys(step.host_ids[0].tolist(), 1)))
        self._executor.start(plan, step)
        started = time.perf_counter()
        self._executor.join(plan, step)
        coordinator.finish(plan)
        return started - began, time.perf_counter() - started
