"""What all MoE layers of a model share: coordinator, executor, slots, backends, and the clock that times them.

Operators add their layer and hand over every step; the host starts the runtime once all layers are there.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch

from hybrimoe_kt.backends.cpu_cpuinfer import CpuInferBackend
from hybrimoe_kt.backends.cpu_llamafile import LlamafileBackend
from hybrimoe_kt.backends.torch_reference import TorchReferenceCpu, TorchReferenceGpu
from hybrimoe_kt.config import ExpertOptions
from hybrimoe_kt.core.coordinator import Coordinator
from hybrimoe_kt.core.cost import CostModel
from hybrimoe_kt.core.profile import load_profile
from hybrimoe_kt.core.types import LayerSpec, Plan, Routing
from hybrimoe_kt.device.accelerator import Accelerator, choose_accelerator
from hybrimoe_kt.device.backend import CpuBackend
from hybrimoe_kt.device.cores import default_expert_threads
from hybrimoe_kt.device.executor import Executor
from hybrimoe_kt.device.host_store import HostStore, LayerExperts
from hybrimoe_kt.device.slots import SlotPool, slots_per_layer
from hybrimoe_kt.errors import ConfigError, KernelError

__all__ = ["LookAhead", "RoutingRecorder", "Runtime", "Seconds"]

logger = logging.getLogger(__name__)

LookAhead = Callable[[torch.Tensor], list[tuple[int, torch.Tensor, torch.Tensor]]]
"""From the hidden states entering a MoE layer to `(layer, scores [num_tokens, num_experts], ids
[num_tokens, top_k])` of the layers after it, nearest first."""


class RoutingRecorder(Protocol):
    """Takes every layer's routing as it happens; the simulator's recorder is one."""

    def record(
        self, layer: int, experts: Any, weights: Any, scores: Any, predicted: Any, predicted_scores: Any
    ) -> None:
        """Experts and weights `[num_tokens, top_k]`, scores `[1, num_experts]`, predictions with a depth in front."""


@dataclass(slots=True)
class Seconds:
    """Where this runtime's wall-clock time went, seconds since the last reset."""

    plan: float = 0.0
    prefetch: float = 0.0
    submit_and_gpu: float = 0.0
    wait: float = 0.0
    steps: int = 0

    def reset(self) -> None:
        for name in fields(self):
            setattr(self, name.name, 0)

    @property
    def total(self) -> float:
        """All time inside the experts operators."""
        return self.plan + self.prefetch + self.submit_and_gpu + self.wait


class Runtime:
    """One a model. `add_layer` for every MoE layer, `start` once, then `run` per layer and step."""

    def __init__(self, options: ExpertOptions) -> None:
        self.options = options
        self.store = HostStore()
        self.seconds = Seconds()
        self.coordinator: Coordinator | None = None
        self.accelerator: Accelerator | None = None
        self.recorder: RoutingRecorder | None = None
        self._look_ahead: dict[int, LookAhead] = {}
        self._scores: dict[int, torch.Tensor] = {}
        self._executor: Executor | None = None
        self._slots_of: dict[int, int] = {}

    @classmethod
    def shared_by(cls, owner: Any, options: ExpertOptions, rule_key: str) -> Runtime:
        """Return the runtime kept on `owner` (the loader that all operators of a model are given), or make it.

        Options must agree between layers; the owner's `option_overrides` (the command line) win over them.
        """
        options = options.replace(getattr(owner, "option_overrides", {}))
        runtime: Runtime | None = getattr(owner, "runtime", None)
        if runtime is None:
            runtime = owner.runtime = cls(options)
        elif runtime.options != options:
            raise ConfigError(
                f"{rule_key}: its expert options differ from an earlier layer's; all MoE layers share one set"
            )
        return runtime

    @property
    def started(self) -> bool:
        return self._executor is not None

    def add_layer(self, experts: LayerExperts) -> None:
        assert not self.started, "layers are added before the runtime starts"
        self.store.add(experts)

    def start(self) -> None:
        """Create slots, backends and coordinator, and fill the slots. May take seconds; call outside generation."""
        options, store = self.options, self.store
        if not store.layers:
            raise ConfigError("no HybriMoEExperts in this model: no rule of the rule file replaces its experts")
        self.accelerator = choose_accelerator(options.accelerator)
        slots = slots_per_layer(options.cache_size, store, self.accelerator) if self.accelerator else {}
        cpu = self._cpu_backend()
        gpu = TorchReferenceGpu() if self.accelerator else None
        for experts in store.layers.values():
            cpu.add_layer(experts)
            if gpu is not None:
                gpu.add_layer(experts)
        pool = SlotPool(self.accelerator, store, slots) if self.accelerator else None
        self._executor = Executor(cpu, gpu, pool)
        self._slots_of = slots
        self.coordinator = self.new_coordinator()
        self._executor.transfer(self.coordinator.initial_transfers())
        logger.info("%s", self.describe())

    def _cpu_backend(self) -> CpuBackend:
        if self.options.cpu_backend == "torch_reference":
            return TorchReferenceCpu()
        threads = self.options.cpu_threads or default_expert_threads()
        backend = CpuInferBackend if self.options.cpu_backend == "cpuinfer" else LlamafileBackend
        return backend(threads, self.options.max_chunk_tokens)

    def layer_specs(self) -> list[LayerSpec]:
        """What the coordinator knows of each MoE layer, in order."""
        return [
            LayerSpec(layer, experts.num_experts, experts.top_k, experts.expert_bytes, self._slots_of.get(layer, 0))
            for layer, experts in sorted(self.store.layers.items())
        ]

    def new_coordinator(self) -> Coordinator:
        """Make a coordinator in its initial state for this model and these options."""
        options = self.options
        profile = load_profile(options.profile)
        costs = {
            layer: CostModel.from_profile(
                profile, expert_bytes=experts.expert_bytes, expert_macs=3 * experts.hidden * experts.inter
            )
            for layer, experts in self.store.layers.items()
        }
        return Coordinator(
            self.layer_specs(),
            costs,
            scheduler=options.scheduler,
            scheduler_options=options.scheduler_options,
            policy=options.policy,
            policy_options=options.policy_options,
            prefetch_size=options.prefetch_size,
            prefetch_depth=options.prefetch_depth,
            predictor=options.predictor,
            predictor_options=options.predictor_options,
        )

    @property
    def num_slots(self) -> int:
        """Experts that can be resident at once, over all layers."""
        pool = self._executor.slots if self._executor else None
        return pool.num_slots if pool else 0

    @property
    def num_expert_threads(self) -> int:
        """Threads the CPU backend keeps busy on its own; 0 when it computes on the caller's."""
        return getattr(self._executor.cpu, "num_threads", 0) if self._executor else 0

    def describe(self) -> str:
        """One line: what was decided."""
        options, store = self.options, self.store
        num_experts = sum(experts.num_experts for experts in store.layers.values())
        where = f"{len(store.layers)} MoE layers, {num_experts} experts, {store.num_bytes / 1e9:.2f} GB"
        threads = self.num_expert_threads
        cpu = options.cpu_backend + (f" ({threads} thread{'s' * (threads != 1)})" if threads else "")
        if self.accelerator is None:
            return f"{where}; all on the CPU: {cpu}"
        pool = self._executor.slots if self._executor else None
        return (
            f"{where}; {self.accelerator.name}: {self.num_slots} slots, "
            f"{(pool.num_bytes if pool else 0) / 1e9:.2f} GB; "
            f"CPU: {cpu}; {options.scheduler} scheduler, {options.policy} policy, "
            f"prefetch {options.prefetch_size or 'off'}, profile {options.profile}"
        )

    @property
    def wants_scores(self) -> bool:
        """Whether anything uses the router's scores: without slots there is nothing to retain."""
        return self.recorder is not None or self.num_slots > 0

    def note_scores(self, layer: int, logits: torch.Tensor) -> None:
        """Keep the router's logits `[num_tokens, num_experts]` of the step about to reach `layer`'s experts."""
        self._scores[layer] = logits

    def look_ahead(self, layer: int, predict: LookAhead) -> None:
        """Register what predicts the routing of the layers after `layer`."""
        self._look_ahead[layer] = predict

    def run(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Compute one layer's experts: `hidden [num_tokens, hidden]`, routing `[num_tokens, top_k]`.

        Returns `[num_tokens, hidden]` in hidden's dtype and device, in memory of its own. Longer steps are
        computed in chunks of `max_chunk_tokens`. Reading the routing is the one synchronisation with the
        router's device; a result moves at most once in each direction.
        """
        if self._executor is None:
            self.start()
        logits = self._scores.pop(layer, None)
        result = torch.empty(hidden.shape, dtype=torch.float32)
        for at in range(0, hidden.shape[0], self.options.max_chunk_tokens):
            chunk = slice(at, at + self.options.max_chunk_tokens)
            result[chunk] = self._run_chunk(
                layer, hidden[chunk], ids[chunk], weights[chunk], None if logits is None else logits[chunk]
            )
        return result.to(device=hidden.device, dtype=hidden.dtype)

    def _run_chunk(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, logits: torch.Tensor | None
    ) -> torch.Tensor:
        assert self.coordinator is not None and self._executor is not None, "started above"
        seconds, now = self.seconds, time.perf_counter
        began = now()
        hidden = hidden.to(device="cpu", dtype=torch.float32).contiguous()
        ids, weights = ids.to("cpu").contiguous(), weights.to(device="cpu", dtype=torch.float32).contiguous()
        if not math.isfinite(hidden.sum().item()) and not hidden.isfinite().all():
            raise KernelError(f"hidden states entering the experts of layer {layer} are not finite (NaN or infinity)")
        routing = routing_of(layer, ids, weights, logits if self.wants_scores else None)
        plan = self.coordinator.plan(routing)
        planned = now()
        try:
            pairs = self._executor.start(plan, hidden, ids, weights)
            started = now()
            predictions = self._prefetch(layer, hidden)
            prefetched = now()
            out = self._executor.join(plan, pairs)
        except BaseException:
            self._abandon(plan)
            raise
        self.coordinator.finish(plan)
        if self.recorder is not None:
            self._record(routing, ids, weights, predictions)
        seconds.plan += planned - began
        seconds.submit_and_gpu += started - planned
        seconds.prefetch += prefetched - started
        seconds.wait += now() - prefetched
        seconds.steps += 1
        return out

    def _abandon(self, plan: Plan) -> None:
        """Leave nothing half done: the CPU share ended, pins released, no slot trusted that this plan filled."""
        assert self.coordinator is not None and self._executor is not None, "a plan was made"
        self._executor.abandon()
        self.coordinator.finish(plan)
        for transfer in plan.transfers:
            self.coordinator.fail(transfer)

    def _record(
        self,
        routing: Routing,
        ids: torch.Tensor,
        weights: torch.Tensor,
        predictions: list[tuple[torch.Tensor, Routing]],
    ) -> None:
        assert self.recorder is not None, "the caller looked"
        # Scores go in averaged, as the coordinator saw them: a replay then decides on the very same numbers.
        self.recorder.record(
            routing.layer,
            ids.numpy(),
            weights.numpy(),
            None if routing.scores is None else [routing.scores],
            [ahead.tolist() for ahead, _ in predictions] or None,
            [[guess.scores] for _, guess in predictions] or None,
        )

    def _prefetch(self, layer: int, hidden: torch.Tensor) -> list[tuple[torch.Tensor, Routing]]:
        """Start transfers for later layers; return the gates' predictions as ids `[num_tokens, top_k]` and routing."""
        if not self.options.prefetch_size or not self.num_slots:
            return []
        assert self.coordinator is not None and self._executor is not None, "a plan was made"
        predict = self._look_ahead.get(layer)
        ahead = predict(hidden) if predict is not None else []
        predictions = [(ids, routing_of(later, ids, None, logits)) for later, logits, ids in ahead]
        transfers = self.coordinator.prefetch(layer, [guess for _, guess in predictions])
        self.coordinator.take_aborted()  # copies are synchronous: what was aborted has long been made
        try:
            self._executor.transfer(transfers)
        except BaseException:
            for transfer in transfers:
                self.coordinator.fail(transfer)
            raise
        return predictions


def routing_of(layer: int, ids: torch.Tensor, weights: torch.Tensor | None, logits: torch.Tensor | None) -> Routing:
    """Turn a step's tensors (`[num_tokens, top_k]`, logits `[num_tokens, num_experts]`) into plain numbers."""
    num_tokens = ids.shape[0]
    flat = ids.flatten().tolist()
    loads: dict[int, int] = {}
    for index in flat:
        loads[index] = loads.get(index, 0) + 1
    summed: dict[int, float] | None = None
    if weights is not None:
        summed = dict.fromkeys(loads, 0.0)
        for index, weight in zip(flat, weights.flatten().tolist(), strict=True):
            summed[index] += weight
    scores: Sequence[float] | None = None
    if logits is not None:
        scores = torch.softmax(logits.float(), dim=-1).mean(dim=0).tolist()
    return Routing(layer, loads, num_tokens, scores, summed)
