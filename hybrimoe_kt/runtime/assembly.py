"""Builds what a runtime runs on: accelerators, backends, slots, coordinator, all from options and experts."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from hybrimoe_kt.backends.cpu_cpuinfer import CpuInferBackend
from hybrimoe_kt.backends.cpu_llamafile import LlamafileBackend
from hybrimoe_kt.backends.gpu_torch import TorchGpu
from hybrimoe_kt.backends.gpu_triton import gpu_backend, unusable
from hybrimoe_kt.backends.torch_reference import TorchReferenceCpu, TorchReferenceGpu
from hybrimoe_kt.config import ExpertOptions
from hybrimoe_kt.core.coordinator import Coordinator
from hybrimoe_kt.core.cost import CostModel
from hybrimoe_kt.core.profile import Profile, load_profile
from hybrimoe_kt.core.types import LayerSpec
from hybrimoe_kt.device.accelerator import Accelerator
from hybrimoe_kt.device.backend import CpuBackend, GpuBackend
from hybrimoe_kt.device.calibrate import calibrate, machine_name, profile_path, trusted_profile
from hybrimoe_kt.device.choose import choose_accelerator
from hybrimoe_kt.device.cores import default_expert_threads, has_core_to_spare
from hybrimoe_kt.device.emulated.adversarial import AdversarialAccelerator
from hybrimoe_kt.device.emulated.immediate import ImmediateAccelerator, host_available_bytes
from hybrimoe_kt.device.emulated.timed import SleepingGpu, TimedAccelerator
from hybrimoe_kt.device.executor import Executor
from hybrimoe_kt.device.host_store import HostStore
from hybrimoe_kt.device.lane import Lane
from hybrimoe_kt.device.slots import slots_per_layer
from hybrimoe_kt.device.waiting import SPIN_S, Patience
from hybrimoe_kt.errors import CalibrationError, CapacityError, ConfigError

__all__ = ["Assembly", "assemble", "cost_of", "make_coordinator", "make_cpu_backend", "make_gpu_backend"]

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 2**20
"""Where no profile names a measured size: 50 us of a PCIe 4.0 x16 link."""
_WHOLE_BYTES = 2**22
"""Experts up to this size are prefetched in one piece from a page-locked copy, where the user names no size of pieces.

An estimate: each further copy costs the host some 4 us and an event, and 4 MiB hold up a PCIe 5.0 x16 link for 80 us.
"""
_HASTY_REPEATS = 3
_ROOM_FOR_A_COPY = 1.25
"""Host memory that must be free before all experts are copied, in their size: the rest is for everything else."""


@dataclass(slots=True)
class Assembly:
    """What `assemble` built."""

    executor: Executor
    profile: Profile
    costs: Mapping[int, CostModel]
    specs: tuple[LayerSpec, ...]
    is_on_the_clock: bool
    """Whether measured seconds mean anything: on hardware and on the timed emulator."""


def assemble(options: ExpertOptions, store: HostStore, accelerator_of: Mapping[int, str]) -> Assembly:
    """Build everything for the layers in `store`; `accelerator_of` names each layer's accelerator."""
    patience = Patience(options.deadline_s, SPIN_S if has_core_to_spare() else 0.0)
    cpu = make_cpu_backend(options)
    for experts in store.layers.values():
        cpu.add_layer(experts)
    served: dict[str, list[int]] = {}
    for layer in sorted(store.layers):
        served.setdefault(accelerator_of[layer], []).append(layer)
    devices = {name: device for name in served if (device := choose_accelerator(name)) is not None}
    gpus = {name: make_gpu_backend(options, device, store) for name, device in devices.items()}
    supported = dict.fromkeys(store.layers, True)
    for name, gpu in gpus.items():
        supported |= {layer: _is_supported(gpu, store, layer) for layer in served[name]}
    profile = _profile(options, store, cpu, devices, gpus, supported)
    costs = {layer: cost_of(profile, store, layer) for layer in store.layers}
    chunk_bytes = options.transfer_chunk_bytes or int(profile.link_chunk_bytes or _CHUNK_BYTES)
    slots = dict.fromkeys(store.layers, 0)
    num_streamed: dict[int, int] = {}
    lanes = []
    for name, device in devices.items():
        if isinstance(device, AdversarialAccelerator):
            cpu = device.watch_cpu(cpu)
        usable = {layer: store.layouts[layer] for layer in served[name] if supported[layer]}
        if usable:
            reserve = options.reserve_bytes + options.prefill_streaming_bytes
            slots |= slots_per_layer(options.cache_size, store, device, usable, reserve_bytes=reserve)
        _make_copyable(options, store, cpu, device, [layer for layer in usable if slots[layer]])
        streamed = _stream_slots(options, store, [layer for layer in usable if slots[layer]])
        num_streamed |= streamed
        try:
            lane = Lane(
                device,
                gpus[name],
                store,
                {layer: slots[layer] for layer in served[name]},
                num_stream_slots=streamed,
                max_tokens=options.max_chunk_tokens,
                cpu_answers_pairs=cpu.answers_pairs,
                chunk_bytes=chunk_bytes,
                patience=patience,
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
            layer, experts.num_experts, experts.top_k, experts.expert_bytes,
            slots[layer], number[layer], supported[layer], num_streamed.get(layer, 0),
        )
        for layer, experts in sorted(store.layers.items())
    )  # fmt: skip
    is_on_the_clock = any(
        device.device.type != "cpu" or isinstance(device, TimedAccelerator) for device in devices.values()
    )
    return Assembly(Executor(cpu, lanes, patience), profile, costs, specs, is_on_the_clock)


def _stream_slots(options: ExpertOptions, store: HostStore, layers: list[int]) -> dict[int, int]:
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


def make_cpu_backend(options: ExpertOptions) -> CpuBackend:
    """The CPU backend that the options name."""
    if options.cpu_backend == "torch_reference":
        return TorchReferenceCpu()
    backend = CpuInferBackend if options.cpu_backend == "cpuinfer" else LlamafileBackend
    return backend(options.cpu_threads or default_expert_threads(), options.max_chunk_tokens)


def make_gpu_backend(options: ExpertOptions, accelerator: Accelerator, store: HostStore) -> GpuBackend:
    """Who computes experts on `accelerator`."""
    if isinstance(accelerator, TimedAccelerator):
        return SleepingGpu(accelerator, {layer: cost_of(accelerator.profile, store, layer) for layer in store.layers})
    name = options.gpu_backend
    if name == "torch_reference" or (name == "auto" and accelerator.device.type == "cpu"):
        return TorchReferenceGpu()
    if name == "torch":
        return TorchGpu()
    reason = unusable(accelerator.device)
    if name == "triton" and reason is not None:
        raise ConfigError(f"gpu_backend is 'triton', but {reason}; or give auto")
    return gpu_backend(accelerator.device)


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
    if name is None or device is None:
        return load_profile("cpu-only")
    if isinstance(device, (ImmediateAccelerator, AdversarialAccelerator)) and not isinstance(device, TimedAccelerator):
        return load_profile("default")
    layer = next((layer for layer, usable in sorted(supported.items()) if usable), None)
    if layer is None:
        return load_profile("default")
    path = profile_path(machine_name(device, cpu))
    if path.is_file():
        return trusted_profile(str(path), machine_name(device, cpu))
    logger.warning("no profile of this machine yet: measuring it briefly; `hybrimoe calibrate` does it thoroughly")
    try:
        measured = calibrate(
            store, layer, cpu, device, gpus[name], max_tokens=options.max_chunk_tokens, repeats=_HASTY_REPEATS,
            patience=Patience(options.deadline_s),
        )  # fmt: skip
    except CalibrationError as error:
        logger.warning("%s; plans are made with the built-in default profile", error)
        return load_profile("default")
    logger.info("%s", measured.verdict)
    if not isinstance(device, TimedAccelerator):
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
    free = [layer for layer in layers if not cpu.copies(layer)]  # one host copy of an expert, not two
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
