"""An accelerator that takes the time a hardware profile gives it, on the real clock, without using a core.

`--accelerator emulated:timed[:PROFILE]`. Every piece of work is given its end when it is enqueued: the link serves
copies first in, first out, the compute queue its kernels, and an event is done once the clock has passed the end of
the work before it. No thread stands for the device: it would take the interpreter from the code being measured.
Experts in slots are not computed and not copied, so a model's answers mean nothing; what is measured is when.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from hybrimoe_kt.core.cost import CostModel
from hybrimoe_kt.core.profile import Profile
from hybrimoe_kt.device.accelerator import HostStamp, Stamp
from hybrimoe_kt.device.backend import GpuBackend, Routed
from hybrimoe_kt.device.experts import LayerExperts
from hybrimoe_kt.device.layout import SlotLayout
from hybrimoe_kt.device.slots import buffer_key
from hybrimoe_kt.errors import ConfigError
from hybrimoe_kt.profiles import load_profile

from .immediate import ImmediateAccelerator

__all__ = ["SleepingGpu", "TimedAccelerator"]


SMALL_BYTES = 2**16
"""Copies up to this size are really made, and pass between large ones: a copy engine serves its queues in turn."""


class _Event:
    __slots__ = ("at_s",)

    def __init__(self) -> None:
        self.at_s = 0.0

    def is_done(self) -> bool:
        return time.perf_counter() >= self.at_s


class _Stream:
    """`free_s`: when everything given to it so far has ended."""

    __slots__ = ("free_s",)

    def __init__(self) -> None:
        self.free_s = 0.0

    def wait(self, event: Any, site: str) -> None:
        self.free_s = max(self.free_s, event.at_s)

    def record(self, event: Any, site: str) -> None:
        event.at_s = self.free_s


class TimedAccelerator(ImmediateAccelerator):
    """One emulated device with the link and GPU of a `Profile`."""

    is_on_the_clock = True
    can_plan = False
    built_in_profile = None

    def __init__(self, name: str, profile: Profile) -> None:
        if not profile.has_gpu:
            raise ConfigError(f"accelerator {name!r}: profile {profile.name!r} describes no GPU; give one that does")
        super().__init__(name)
        self.profile = profile
        self.compute: Any = _Stream()
        self.busy_s = {"link": 0.0, "gpu": 0.0}
        self._latency_s = profile.link_latency_s or 0.0
        self._bytes_per_s = profile.link_bytes_per_s or float("inf")
        self._link: deque[tuple[float, float]] = deque()
        """When the large copies begin and end, in order."""
        self._device_memory: set[int] = set()
        self._launch_s = 0.0

    @classmethod
    def named(cls, name: str, profile: str | None) -> TimedAccelerator:
        """Make one from a profile's name or file."""
        return cls(name, load_profile(profile or "default"))

    def stream(self, name: str, *, low_priority: bool = False) -> Any:
        return _Stream()

    def event(self) -> Any:
        return _Event()

    def allocate(self, num_bytes: int) -> torch.Tensor:
        memory = super().allocate(num_bytes)
        self._device_memory.add(memory.untyped_storage().data_ptr())
        return memory

    def copy(self, stream: Any, target: torch.Tensor, source: torch.Tensor, site: str) -> None:
        num_bytes = target.numel() * target.element_size()
        to_device = target.untyped_storage().data_ptr() in self._device_memory
        if not to_device or num_bytes <= SMALL_BYTES:
            target.copy_(source)
        seconds = self._latency_s + num_bytes / self._bytes_per_s
        ready_s = max(time.perf_counter(), stream.free_s)
        if not to_device:  # the link has a direction of its own for that
            stream.free_s = ready_s + seconds
        elif num_bytes <= SMALL_BYTES:
            stream.free_s = self._gap_s(ready_s) + seconds
        else:
            begin_s = max(ready_s, self._link[-1][1] if self._link else 0.0)
            stream.free_s = begin_s + seconds
            self._link.append((begin_s, stream.free_s))
            self.busy_s["link"] += seconds

    def _gap_s(self, ready_s: float) -> float:
        """When a small copy gets its turn: after the large one in service, before those behind it."""
        while self._link and self._link[0][1] <= time.perf_counter():
            self._link.popleft()
        return next((end_s for begin_s, end_s in self._link if begin_s <= ready_s < end_s), ready_s)

    def launch(
        self,
        stream: Any,
        work: Callable[[], object],
        *,
        reads: Sequence[torch.Tensor],
        writes: Sequence[torch.Tensor],
        site: str,
    ) -> None:
        if site == "take blocks apart":
            return  # in slots: bytes that do not matter here, a few microseconds of a real device
        self._launch_s = 0.0
        work()
        stream.free_s = max(time.perf_counter(), stream.free_s) + self._launch_s
        self.busy_s["gpu"] += self._launch_s

    def own_gpu_backend(self, costs: Callable[[Profile], Mapping[int, CostModel]]) -> GpuBackend | None:
        return SleepingGpu(self, costs(self.profile))

    def occupy(self, seconds: float) -> None:
        """Called by work being launched: it takes so long."""
        self._launch_s += seconds

    def hand_over(self, event: Any, wait: Callable[[Callable[[], bool], str], None]) -> None:
        wait(event.is_done, f"the experts' result on {self.name}")

    has_times = True
    stamps_are = "emulated: computed from the profile when work is given"

    def stamp(self, stream: Any) -> Stamp:
        return HostStamp(max(time.perf_counter(), stream.free_s))

    def describe(self) -> str:
        return f"emulated, timed as {self.profile.hardware}"


class SleepingGpu(GpuBackend):
    """Stands for the GPU's experts: takes their predicted time and leaves the answer as it is."""

    name = "sleeping"
    answers_pairs = False
    finds_routed = False

    def __init__(self, accelerator: TimedAccelerator, costs: Mapping[int, CostModel]) -> None:
        self._accelerator, self._costs = accelerator, costs

    def add_layer(self, experts: LayerExperts, layout: SlotLayout, memory: torch.Tensor) -> None:
        """Nothing to note: costs are known by layer."""

    def launch(
        self, layer: int, slots: Sequence[tuple[int, int]], slot_of: torch.Tensor, routed: Routed, out: torch.Tensor
    ) -> None:
        seconds = self._costs[layer if layer >= 0 else buffer_key(layer)].gpu_expert_s
        if routed.ids.shape[0] == 1:
            self._accelerator.occupy(seconds[1] * len(slots))
            return
        loads = torch.bincount(routed.ids.flatten(), minlength=len(slot_of)).tolist()
        self._accelerator.occupy(sum(seconds[loads[expert]] for expert, _ in slots))
