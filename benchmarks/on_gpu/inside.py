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
from hybrimoe_kt.device.calibrate import Calibration, calibrate
from hybrimoe_kt.engine.build import build_engine
from hybrimoe_kt.engine.engine import Engine
from hybrimoe_kt.runtime import assembly
from hybrimoe_kt.runtime.runtime import Runtime

from .timing import synchronize

__all__ = ["calibrated", "load", "poison_workspace", "poisoned", "restart", "watched_plans"]

_POISON = 0xFF
"""As any float NaN, as any integer -1."""
_LARGE_BYTES = 2**26
_make_cpu_backend = assembly.make_cpu_backend


def load(file: Path, options: dict[str, Any]) -> Engine:
    """Build an engine whose runtime may start again: CPU backend and page-locked copies are kept between starts."""
    kept: dict[str, Any] = {}

    def one_backend(options: Any) -> Any:  # kt-kernel's kernels hold buffers, so one set serves all
        if options.cpu_backend not in kept:
            backend: Any = _make_cpu_backend(options)
            kept[options.cpu_backend] = backend
            add, known = backend.add_layer, set()

            def add_once(experts: Any) -> None:
                if experts.layer not in known:
                    known.add(experts.layer)
                    add(experts)

            backend.add_layer = add_once
        return kept[options.cpu_backend]

    assembly.make_cpu_backend = one_backend
    engine = build_engine(file, progress=False, option_overrides=options)
    store = engine.runtime.store
    page_lock = store.page_lock

    def lock_once(accelerator: Any, layers: Any, *rest: Any) -> None:
        page_lock(accelerator, [layer for layer in layers if not store.is_copied(layer)], *rest)

    store.page_lock = lock_once  # type: ignore[method-assign]
    return engine


def restart(engine: Engine, changes: dict[str, Any]) -> None:
    """Stop the runtime and start it with changed options: new slots, a new cache, health as of a new run."""
    runtime = engine.runtime
    for accelerator in runtime.accelerators:  # prefetches may be on their way into slots that are given back here
        synchronize(accelerator.device)
    engine.reset()
    runtime._executor = runtime._assembly = runtime._recovery = runtime._watch = runtime.coordinator = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    runtime.options = runtime.options.replace(changes)
    runtime.start()


def calibrated(runtime: Runtime, repeats: int) -> Calibration:
    """Measure what plans are predicted with, beside the running lanes, whose kernels are left alone."""
    executor = runtime._executor
    assert executor is not None, "the runtime has started"
    device, store = executor.lanes[0].accelerator, runtime.store
    gpu = assembly.make_gpu_backend(runtime.options, device, store)
    layer = executor.lanes[0].layers[0]
    return calibrate(
        store, layer, executor.cpu, device, gpu, max_tokens=runtime.options.max_chunk_tokens, repeats=repeats
    )


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Whatever accelerators allocate meanwhile is full of NaN: slots, lanes' buffers, small page-locked boxes."""
    choose = assembly.choose_accelerator

    def choose_poisoned(name: str) -> Any:
        device: Any = choose(name)
        if device is not None:
            device.allocate, device.page_locked = _filled(device.allocate), _filled(device.page_locked)
        return device

    assembly.choose_accelerator = choose_poisoned
    try:
        yield
    finally:
        assembly.choose_accelerator = choose


def _filled(allocate: Callable[[int], torch.Tensor]) -> Callable[[int], torch.Tensor]:
    def filled(num_bytes: int) -> torch.Tensor:
        memory = allocate(num_bytes)
        if memory.device.type != "cpu" or num_bytes < _LARGE_BYTES:  # copies of all experts are written anyway
            memory.fill_(_POISON)
        return memory

    return filled


def poison_workspace(runtime: Runtime) -> None:
    """Fill what the kernels share between their launches."""
    for lane in runtime._executor.lanes if runtime._executor else ():
        space = getattr(lane.gpu, "_space", None)
        if space is not None:
            space.memory.fill_(_POISON)


@contextlib.contextmanager
def watched_plans(runtime: Runtime) -> Iterator[list[tuple[float, float]]]:
    """Collect (predicted, measured) seconds of every layer step that is planned; waits for the device around each."""
    coordinator = runtime.coordinator
    assert coordinator is not None, "the runtime has started"
    decide, run = coordinator.plan, runtime.run
    found: list[tuple[float, float]] = []
    plans: list[Plan] = []

    def plan(routing: Routing) -> Plan:
        plans.append(decide(routing))
        return plans[-1]

    def timed(layer: int, hidden: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        plans.clear()
        synchronize(hidden.device)
        began = time.perf_counter()
        answer = run(layer, hidden, *rest)
        synchronize(hidden.device)
        if len(plans) == 1:
            found.append((plans[0].makespan_s, time.perf_counter() - began))
        return answer

    coordinator.plan, runtime.run = plan, timed  # type: ignore[method-assign, assignment]
    try:
        yield found
    finally:
        del coordinator.plan, runtime.run
