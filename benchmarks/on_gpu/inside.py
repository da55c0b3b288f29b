"""All that this package does to private parts of engine and runtime, so that one load serves every configuration."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from hybrimoe_kt.core.types import Plan, Routing
from hybrimoe_kt.device.backend import CpuBackend
from hybrimoe_kt.device.calibrate import Calibration, calibrate
from hybrimoe_kt.device.choose import choose_accelerator
from hybrimoe_kt.device.sent_routing import SentRouting
from hybrimoe_kt.engine.build import build_engine
from hybrimoe_kt.engine.engine import Engine
from hybrimoe_kt.runtime import Job, ModelExperts, Routed, Runtime, assemble
from hybrimoe_kt.runtime.assembly import make_gpu_backend

from .timing import synchronize

__all__ = ["calibrated", "load", "poison_workspace", "restart", "watched_plans"]

_POISON = 0xFF
"""As any float NaN, as any integer -1."""
_LARGE_BYTES = 2**26


def load(file: Path, options: dict[str, Any]) -> Engine:
    """Build an engine; whatever its runtime allocates begins as NaN."""
    return build_engine(file, progress=False, option_overrides=options, assemble=_assemble_poisoned)


def restart(engine: Engine, changes: dict[str, Any], *, poison: bool) -> None:
    """Stop the runtime and start one with changed options: new slots, a new cache, health as of a new run.

    The CPU backend and page-locked copies are kept. `poison` fills with NaN what is allocated.
    """
    old = engine.runtime
    for accelerator in old.accelerators:  # prefetches may be on their way into slots that are given back here
        synchronize(accelerator.device)
    engine.start_anew()  # what was captured holds the old runtime's memory
    experts, cpu = old.experts.replace(changes), old.executor.cpu
    same_cpu = experts.options.cpu_backend == old.options.cpu_backend
    engine.loaded.detach()
    del old
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    make = _assemble_poisoned if poison else assemble
    engine.loaded.attach(make(experts, cpu=_Loaded(cpu) if same_cpu else None))
    if poison:
        poison_workspace(engine.runtime)


class _Loaded:
    """A CPU backend that has taken every layer: kt-kernel's kernels hold buffers, so one set serves all."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend._backend if isinstance(backend, _Loaded) else backend

    def add_layer(self, experts: Any) -> None:
        """It is there."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


def calibrated(runtime: Runtime, repeats: int) -> Calibration:
    """Measure what plans are predicted with, beside the running lanes, whose kernels are left alone."""
    lane, store = runtime.lanes[0], runtime.store
    gpu = make_gpu_backend(runtime.options, lane.accelerator, store)
    return calibrate(
        store, lane.layers[0], runtime.executor.cpu, lane.accelerator, gpu,
        max_tokens=runtime.options.max_chunk_tokens, repeats=repeats,
    )  # fmt: skip


def _assemble_poisoned(experts: ModelExperts, cpu: CpuBackend | None = None) -> Runtime:
    """What the accelerators allocate at the start is full of NaN: slots, lanes' buffers, page-locked boxes."""
    devices = {name: choose_accelerator(name) for name in set(experts.accelerator_of.values())}
    for device in devices.values():
        if device is not None:
            accelerator: Any = device
            accelerator.allocate, accelerator.page_locked = map(_filled, (device.allocate, device.page_locked))
    made = {name: device for name, device in devices.items() if device is not None}
    return assemble(experts, cpu=cpu, accelerators=made)


def _filled(allocate: Callable[[int], torch.Tensor]) -> Callable[[int], torch.Tensor]:
    def filled(num_bytes: int) -> torch.Tensor:
        memory = allocate(num_bytes)
        if memory.device.type != "cpu" or num_bytes < _LARGE_BYTES:  # copies of all experts are written anyway
            memory.fill_(_POISON)
        return memory

    return filled


def poison_workspace(runtime: Runtime) -> None:
    """Fill what the kernels share between their launches."""
    for lane in runtime.lanes:
        space = getattr(lane.gpu, "_space", None)
        if space is not None:
            space.memory.fill_(_POISON)


@contextlib.contextmanager
def watched_plans(runtime: Runtime) -> Iterator[list[tuple[float, float]]]:
    """Collect (predicted, measured) seconds of every layer step that is planned; waits for the device around each.

    What a block computes between the two doors is measured with it.
    """
    decide, begin, finish = runtime.coordinator.plan, runtime.begin, runtime.finish
    found: list[tuple[float, float]] = []
    plans: list[Plan] = []
    began, is_open = 0.0, False

    def plan(routing: Routing) -> Plan:
        plans.append(decide(routing))
        return plans[-1]

    def timed_begin(layer: int, routed: Routed, sent: SentRouting | None = None) -> Job:
        nonlocal began, is_open
        plans.clear()
        synchronize(routed.hidden.device)
        began, is_open = time.perf_counter(), False  # a long prompt's first chunks are finished in here
        job = begin(layer, routed, sent)
        is_open = True
        return job

    def timed_finish(job: Job, into: torch.Tensor | None = None) -> torch.Tensor:
        answer = finish(job, into)
        synchronize(answer.device)
        if is_open and len(plans) == 1:
            found.append((plans[0].makespan_s, time.perf_counter() - began))
        return answer

    runtime.coordinator.plan, runtime.begin, runtime.finish = plan, timed_begin, timed_finish  # type: ignore[method-assign]
    try:
        yield found
    finally:
        del runtime.coordinator.plan, runtime.begin, runtime.finish
