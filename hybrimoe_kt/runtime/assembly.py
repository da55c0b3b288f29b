"""Builds what a runtime runs on: accelerators, backends, slots, coordinator, all from options and experts."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from hybrimoe_kt.backends.registry import cpu_backend, make_gpu
from hybrimoe_kt.config import ExpertOptions
from hybrimoe_kt.core.coordinator import Coordinator
from hybrimoe_kt.core.cost import CostModel
from hybrimoe_kt.core.memory_plan import MemoryPlan
from hybrimoe_kt.core.profile import Profile
from hybrimoe_kt.core.types import LayerSpec
from hybrimoe_kt.device.accelerator import Accelerator
from hybrimoe_kt.device.backend import CpuBackend, GpuBackend
from hybrimoe_kt.device.calibrate import calibrate, machine_name, profile_path, trusted_profile
from hybrimoe_kt.device.choose import choose_accelerator
from hybrimoe_kt.device.cores import has_core_to_spare
from hybrimoe_kt.device.emulated.immediate import host_available_bytes
from hybrimoe_kt.device.executor import Executor
from hybrimoe_kt.device.host_store import HostStore
from hybrimoe_kt.device.lane import Lane
from hybrimoe_kt.device.slots import slots_per_layer
from hybrimoe_kt.device.waiting import SPIN_S, Deadline
from hybrimoe_kt.errors import CalibrationError, CapacityError, ConfigError
from hybrimoe_kt.profiles import load_profile

from .experts import ModelExperts

__all__ = ["Assembly", "build", "cost_of", "make_cpu_backend", "make_gpu_backend"]

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 2**20
"""Where no profile names a measured size: 50 us of a PCIe 4.0 x16 link."""
_WHOLE_BYTES = 2**22
"""Experts up to this size are prefetched in one piece from a page-locked copy, where the user names no size of pieces.

An estimate: each further copy costs the host some 4 us and an event, and 4 MiB hold up a PCIe 5.0 x16 link for 80 us.
"""
_HASTY_REPEATS = 3
_UNPLANNED_BYTES = 3 * 2**28
"""Left for keys, values, activations and workspace where a host does not say what they take. An assumption."""
_ROOM_FOR_A_COPY = 1.25
"""Host memory that must be free before all experts are copied, in their size: the rest is for everything else."""


@dataclass(frozen=True, slots=True)
class Assembly:
    """What a runtime runs on."""

    executor: Executor
    profile: Profile
    costs: Mapping[int, CostModel]
    specs: tuple[LayerSpec, ...]
    is_on_the_clock: bool
    """Whether measured seconds mean anything."""

    def make_coordinator(self, options: ExpertOptions) -> Coordinator:
        """A coordinator in its initial state."""
        return Coordinator(self.specs, self.costs, options.strategy)


def build(
    experts: ModelExperts,
    cpu: CpuBackend | None,
    accelerators: Mapping[str, Accelerator],
    given_gpus: Mapping[str, GpuBackend],
) -> Assembly:
    """Make everything for the layers of `experts` but what is given, see `runtime.assemble`."""
    options, store = experts.options, experts.store
    if not store.layers:
        raise ConfigError("no layer's experts were added; rule files name HybriMoEExperts for that")
    deadline = Deadline(options.deadline_s, SPIN_S if has_core_to_spare() else 0.0)
    served: dict[str, list[int]] = {}
    for layer in sorted(store.layers):
        served.setdefault(experts.accelerator_of[layer], []).append(layer)
    found = {name: accelerators.get(name) or choose_accelerator(name) for name in served}
    devices = {name: device for name, device in found.items() if device is not None}
    cpu = make_cpu_backend(options, beside_accelerator=bool(devices)) if cpu is None else cpu
    for layer_experts in store.layers.values():
        cpu.add_layer(layer_experts)
    gpus = {name: given_gpus.get(name) or make_gpu_backend(options, device, store) for name, device in devices.items()}
    supported = dict.fromkeys(store.layers, True)
    for name, gpu in gpus.items():
        supported |= {layer: _is_supported(gpu, store, layer) for layer in served[name]}
    profile = _profile(options, store, cpu, devices, gpus, supported)
    if profile.cpu_backends:
        cpu.choose(profile.cpu_backends)
    costs = {layer: cost_of(profile, store, layer) for layer in store.layers}
    chunk_bytes = options.transfer_chunk_bytes or int(profile.link_chunk_bytes or _CHUNK_BYTES)
    slots = dict.fromkeys(store.layers, 0)
    num_streamed: dict[int, int] = {}
    lanes = []
    for name, device in devices.items():
        cpu = device.watch_cpu(cpu)
        usable = {layer: store.layouts[layer] for layer in served[name] if supported[layer]}
        if usable:
            budget = _auto_budget(device, options, experts.plans.get(name))
            slots |= slots_per_layer(options.cache_size, store, device, usable, auto_bytes=budget)
        _make_copyable(options, store, cpu, device, [layer for layer in usable if slots[layer]])
        streamed = _buffer_slots(options, store, [layer for layer in usable if slots[layer]])
        num_streamed |= streamed
        try:
            lane = Lane(
                device,
                gpus[name],
                store,
                {layer: slots[layer] for layer in served[name]},
                num_buffer_slots=streamed,
                max_tokens=options.max_chunk_tokens,
                cpu_answers_pairs=cpu.answers_pairs,
                chunk_bytes=chunk_bytes,
                deadline=deadline,
                whole_bytes=0 if options.transfer_chunk_bytes else _WHOLE_BYTES,
            )
        except torch.OutOfMemoryError:
            raise CapacityError(
                f"{name} has no memory left beside the expert cache for the kernels' workspace; give a smaller "
                f"cache_size, or a larger reserve_bytes"
            ) from None
        lanes.append(lane)
    number = {layer: place for place, layers in enumerate(served.values()) for layer in layers}
    specs = tuple(
        LayerSpec(
            layer, held.num_experts, held.top_k, held.expert_bytes,
            slots[layer], number[layer], supported[layer], num_streamed.get(layer, 0),
        )
        for layer, held in sorted(store.layers.items())
    )  # fmt: skip
    is_on_the_clock = any(device.is_on_the_clock for device in devices.values())
    return Assembly(Executor(cpu, lanes, deadline), profile, costs, specs, is_on_the_clock)


def _auto_budget(device: Accelerator, options: ExpertOptions, plan: MemoryPlan | None) -> int:
    """Bytes that `cache_size: auto` may use: what the plan leaves, and no more than is free beside its other lines."""
    if plan is None:
        return device.auto_budget_bytes(options.reserve_bytes + options.prefill_streaming_bytes + _UNPLANNED_BYTES)
    return min(plan.left_bytes, device.auto_budget_bytes(plan.step_bytes))


def _buffer_slots(options: ExpertOptions, store: HostStore, layers: list[int]) -> dict[int, int]:
    """How many slots of `prefill_streaming_bytes` each layer may borrow: half of them, never more than it has experts.

    ConfigError when that is not even one expert.
    """
    if not options.prefill_streaming_bytes or not layers:
        return {}
    per_buffer = options.prefill_streaming_bytes // 2
    found = {
        layer: min(per_buffer // store.layouts[layer].slot_bytes, store.layers[layer].num_experts) for layer in layers
    }
    if not all(found.values()):
        needed = 2 * max(store.layouts[layer].slot_bytes for layer in layers)
        raise ConfigError(
            f"prefill_streaming_bytes is {options.prefill_streaming_bytes}: two buffers of at least one expert take "
            f"{needed} bytes; give more, or 0 for no streaming"
        )
    return found


def make_cpu_backend(options: ExpertOptions, *, beside_accelerator: bool) -> CpuBackend:
    """The CPU backend that the options name."""
    backend = cpu_backend(options.cpu_backend)
    threads = options.cpu_threads or backend.default_threads(beside_accelerator=beside_accelerator)
    return backend(threads, options.max_chunk_tokens)


def make_gpu_backend(options: ExpertOptions, accelerator: Accelerator, store: HostStore) -> GpuBackend:
    """Who computes experts on `accelerator`."""
    own = accelerator.own_gpu_backend(lambda profile: {layer: cost_of(profile, store, layer) for layer in store.layers})
    if own is not None:
        return own
    return make_gpu(options.gpu_backend, accelerator.device)


def _profile(
    options: ExpertOptions,
    store: HostStore,
    cpu: CpuBackend,
    devices: Mapping[str, Accelerator],
    gpus: Mapping[str, GpuBackend],
    supported: Mapping[int, bool],
) -> Profile:
    """The profile that plans are predicted with: the one named, this machine's own, or one measured in a hurry."""
    name = next(iter(devices), None)
    device = devices[name] if name is not None else None
    if options.profile != "auto":
        return trusted_profile(options.profile, machine_name(device, cpu))
    path = profile_path(machine_name(device, cpu))
    if name is None or device is None:
        return trusted_profile(str(path), machine_name(None, cpu)) if path.is_file() else load_profile("cpu-only")
    if device.built_in_profile is not None:
        return load_profile(device.built_in_profile)
    layer = next((layer for layer, usable in sorted(supported.items()) if usable), None)
    if layer is None:
        return load_profile("default")
    if path.is_file():
        return trusted_profile(str(path), machine_name(device, cpu))
    logger.warning("no profile of this machine yet: measuring it briefly; `hybrimoe calibrate` does it thoroughly")
    try:
        measured = calibrate(
            store, layer, cpu, device, gpus[name], max_tokens=options.max_chunk_tokens, repeats=_HASTY_REPEATS,
            deadline=Deadline(options.deadline_s),
        )  # fmt: skip
    except CalibrationError as error:
        logger.warning("%s; plans are made with the built-in default profile", error)
        return load_profile("default")
    logger.info("%s", measured.verdict)
    if device.device.type != "cpu":  # an emulated machine's numbers are nobody's
        measured.save(path)
    return measured.profile


def _is_supported(gpu: GpuBackend, store: HostStore, layer: int) -> bool:
    reason = gpu.refuses(store.layers[layer])
    if reason is not None:
        logger.warning("layer %d stays on the CPU: %s", layer, reason)
    return reason is None


def cost_of(profile: Profile, store: HostStore, layer: int) -> CostModel:
    """Scale a profile to one layer's experts."""
    experts = store.layers[layer]
    macs = 3 * experts.hidden * experts.inter
    return CostModel.from_profile(profile, expert_bytes=experts.expert_bytes, expert_macs=macs)


def _make_copyable(
    options: ExpertOptions, store: HostStore, cpu: CpuBackend, accelerator: Accelerator, layers: list[int]
) -> None:
    """Let the device copy straight from host memory where the user and the host allow it; else staging serves."""
    if options.host_store == "auto" and accelerator.device.type == "cpu":
        return  # emulated: nothing is gained
    free = [layer for layer in layers if not (cpu.copies(layer) or store.is_copied(layer))]  # one host copy, not two
    needed = sum(store.layers[layer].num_experts * store.layouts[layer].slot_bytes for layer in free)
    if options.host_store == "page_locked" or (
        options.host_store == "auto" and needed * _ROOM_FOR_A_COPY < host_available_bytes()
    ):
        try:
            store.page_lock(accelerator, free, _progress)
        except CapacityError as error:
            if options.host_store == "page_locked":
                raise
            logger.warning("%s; transfers go through staging", error)
    left = [layer for layer in layers if not store.is_direct(layer)]
    if left and not store.register(accelerator, left):
        logger.info("the mapped file cannot be page-locked in place; transfers go through staging")


def _progress(layers: Iterable[int]) -> Iterable[int]:
    from tqdm.auto import tqdm

    shown: Iterable[int] = tqdm(layers, desc="page-locking experts", unit="layer", disable=not sys.stderr.isatty())
    return shown
