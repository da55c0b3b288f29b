"""Builds what a runtime runs on: accelerators, backends, slots, coordinator, all from options and experts."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hybrimoe_kt.backends.cpu_llamafile import LlamafileBackend
from hybrimoe_kt.backends.torch_reference import TorchReferenceCpu, TorchReferenceGpu
from hybrimoe_kt.config import ExpertOptions
from hybrimoe_kt.core.coordinator import Coordinator
from hybrimoe_kt.core.cost import CostModel
from hybrimoe_kt.core.profile import Profile, load_profile
from hybrimoe_kt.core.types import LayerSpec
from hybrimoe_kt.device.accelerator import Accelerator
from hybrimoe_kt.device.backend import CpuBackend, GpuBackend
from hybrimoe_kt.device.choose import choose_accelerator
from hybrimoe_kt.device.cores import default_expert_threads
from hybrimoe_kt.device.emulated.adversarial import AdversarialAccelerator
from hybrimoe_kt.device.emulated.immediate import ImmediateAccelerator, host_available_bytes
from hybrimoe_kt.device.emulated.timed import SleepingGpu, TimedAccelerator
from hybrimoe_kt.device.executor import Executor
from hybrimoe_kt.device.host_store import HostStore
from hybrimoe_kt.device.lane import Lane
from hybrimoe_kt.device.slots import slots_per_layer
from hybrimoe_kt.device.waiting import Patience
from hybrimoe_kt.errors import CapacityError

__all__ = ["Assembly", "assemble", "make_coordinator"]

logger = logging.getLogger(__name__)

_ROOM_FOR_A_COPY = 1.25
"""Host memory that must be free before all experts are copied, in their size: the rest is for everything else."""


@dataclass(slots=True)
class Assembly:
    """What `assemble` built."""

    executor: Executor
    profile: Profile
    costs: Mapping[int, CostModel]
    specs: tuple[LayerSpec, ...]


def assemble(options: ExpertOptions, store: HostStore, accelerator_of: Mapping[int, str]) -> Assembly:
    """Build everything for the layers in `store`; `accelerator_of` names each layer's accelerator."""
    patience = Patience(options.deadline_s)
    cpu = _cpu_backend(options)
    for experts in store.layers.values():
        cpu.add_layer(experts)
    names = list(dict.fromkeys(accelerator_of.values()))
    accelerators = {name: choose_accelerator(name) for name in names}
    profile = load_profile("default" if options.profile == "auto" else options.profile)
    costs = {layer: _cost(profile, store, layer) for layer in store.layers}
    lanes, specs = [], []
    for number, (name, accelerator) in enumerate(accelerators.items()):
        layers = [layer for layer in sorted(store.layers) if accelerator_of[layer] == name]
        slots: Mapping[int, int] = dict.fromkeys(layers, 0)
        supported = dict.fromkeys(layers, True)
        if accelerator is not None:
            if isinstance(accelerator, AdversarialAccelerator):
                cpu = accelerator.watch_cpu(cpu)
            gpu = _gpu_backend(options, accelerator, costs)
            supported = {layer: _is_supported(gpu, store, layer) for layer in layers}
            slots = _slots(options, store, accelerator, [layer for layer in layers if supported[layer]])
            _make_copyable(options, store, cpu, accelerator, [layer for layer in layers if slots.get(layer)])
            lanes.append(
                Lane(
                    accelerator,
                    gpu,
                    store,
                    {layer: slots.get(layer, 0) for layer in layers},
                    max_tokens=options.max_chunk_tokens,
                    cpu_answers_pairs=cpu.answers_pairs,
                    chunk_bytes=options.transfer_chunk_bytes,
                    patience=patience,
                )
            )
        for layer in layers:
            specs.append(_spec(store, layer, slots.get(layer, 0), number, supported[layer]))
    specs.sort(key=lambda spec: spec.layer)
    return Assembly(Executor(cpu, lanes, patience), profile, costs, tuple(specs))


def make_coordinator(options: ExpertOptions, assembly: Assembly) -> Coordinator:
    """Make a coordinator in its initial state."""
    return Coordinator(
        assembly.specs,
        assembly.costs,
        scheduler=options.scheduler,
        scheduler_options=options.scheduler_options,
        policy=options.policy,
        policy_options=options.policy_options,
        prefetch_size=options.prefetch_size,
        prefetch_depth=options.prefetch_depth,
        predictor=options.predictor,
        predictor_options=options.predictor_options,
    )


def _cpu_backend(options: ExpertOptions) -> CpuBackend:
    if options.cpu_backend == "torch_reference":
        return TorchReferenceCpu()
    return LlamafileBackend(options.cpu_threads or default_expert_threads(), options.max_chunk_tokens)


def _gpu_backend(options: ExpertOptions, accelerator: Accelerator, costs: Mapping[int, CostModel]) -> GpuBackend:
    if isinstance(accelerator, TimedAccelerator):
        return SleepingGpu(accelerator, costs)
    return TorchReferenceGpu()


def _is_supported(gpu: GpuBackend, store: HostStore, layer: int) -> bool:
    reason = gpu.refuses(store.layers[layer])
    if reason is not None:
        logger.warning("layer %d stays on the CPU: %s", layer, reason)
    return reason is None


def _cost(profile: Profile, store: HostStore, layer: int) -> CostModel:
    experts = store.layers[layer]
    macs = 3 * experts.hidden * experts.inter
    return CostModel.from_profile(profile, expert_bytes=experts.expert_bytes, expert_macs=macs)


def _spec(store: HostStore, layer: int, num_slots: int, accelerator: int, supported: bool) -> LayerSpec:
    experts = store.layers[layer]
    return LayerSpec(layer, experts.num_experts, experts.top_k, experts.expert_bytes, num_slots, accelerator, supported)


def _slots(options: ExpertOptions, store: HostStore, accelerator: Accelerator, layers: list[int]) -> dict[int, int]:
    if not layers:
        return {}
    return slots_per_layer(options.cache_size, store, accelerator, {layer: store.layouts[layer] for layer in layers})


def _make_copyable(
    options: ExpertOptions, store: HostStore, cpu: CpuBackend, accelerator: Accelerator, layers: list[int]
) -> None:
    """Let the device copy straight from host memory where the user and the host allow it; else staging serves."""
    if isinstance(accelerator, (ImmediateAccelerator, AdversarialAccelerator)) and options.host_store == "auto":
        return  # emulated: nothing is gained by a copy
    free = [layer for layer in layers if not cpu.copies(layer)]  # one host copy of an expert, not two
    needed = sum(store.layers[layer].num_experts * store.layouts[layer].slot_bytes for layer in free)
    wanted = options.host_store == "page_locked"
    if wanted or (options.host_store == "auto" and needed * _ROOM_FOR_A_COPY < host_available_bytes()):
        try:
            store.page_lock(accelerator, free, _progress)
        except CapacityError as error:
            if wanted:
                raise
            logger.warning("%s; transfers go through staging", error)
    elif options.host_store == "auto" and not store.register(accelerator, free):
        logger.info("the mapped file cannot be page-locked in place; transfers go through staging")


def _progress(layers: Iterable[int]) -> Iterable[int]:
    from tqdm.auto import tqdm

    shown: Iterable[int] = tqdm(layers, desc="page-locking experts", unit="layer", disable=not sys.stderr.isatty())
    return shown
