"""Clocks that do not fool themselves about work that only has been enqueued."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

__all__ = ["captured", "host_s", "on_device_s", "synchronize", "whole_s"]


def synchronize(device: torch.device) -> None:
    """Wait for everything given to `device`."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def whole_s(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Best of `repeats`, from an idle device to an idle one: for copies, whose least disturbed run is the rate."""
    best = float("inf")
    for _ in range(repeats):
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        best = min(best, time.perf_counter() - began)
    return best


def on_device_s(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median on the device's own clock; on the CPU, on the host's."""
    if device.type != "cuda":
        return statistics.median(whole_s(work, device, 1) for _ in range(repeats))
    samples = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(samples)


def host_s(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """What enqueueing costs the host on average, whenever the device may come to it."""
    work()
    synchronize(device)
    began = time.perf_counter()
    for _ in range(repeats):
        work()
    seconds = time.perf_counter() - began
    synchronize(device)
    return seconds / repeats


def captured(work: Callable[[], object]) -> Callable[[], None]:
    """`work` as a CUDA graph of the current card: starting it then costs next to nothing."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay
