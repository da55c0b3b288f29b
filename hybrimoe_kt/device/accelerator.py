"""What an accelerator promises the device layer, and nothing more.

Ordering guarantees every implementation keeps, and the only ones the executor relies on:

1. Work given to one stream runs in the order given. Streams run independently of each other and of the host.
2. `record` marks a point in its stream; `wait` keeps a stream from going on until the *last* mark made before the
   call has been reached. Waiting on an event that was never recorded waits for nothing.
3. Work begins after it was given: what the host did before the call is visible to it. Nothing else is.
4. The host sees the result of work once an event recorded after it `is_done`; not before.
5. The model's own tensors are produced and consumed on `compute`; `hand_over` makes what `compute` has been given
   visible to whoever consumes them (nothing to do where the model runs on that stream).

Each wait and record names its `site`: what it is for, in the words of a race report. Work declares what it reads
and writes, as contiguous tensors; hardware ignores that, the emulators check it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

import torch

from hybrimoe_kt.core.cost import CostModel
from hybrimoe_kt.core.profile import Profile

if TYPE_CHECKING:
    from .backend import CpuBackend, GpuBackend
    from .step_graph import StepCapture, StepGraph

__all__ = ["Accelerator", "Event", "HostStamp", "Stamp", "Stream"]


class Event(Protocol):
    """A mark in a stream; may be recorded again and again."""

    def is_done(self) -> bool:
        """Whether the last mark has been reached (True if never recorded); never blocks.

        Raises what the work before the mark failed with, where the device reports that late.
        """


class Stream(Protocol):
    """A queue of work on one device."""

    def wait(self, event: Event, site: str) -> None:
        """Let later work of this stream start only after `event`'s last mark."""

    def record(self, event: Event, site: str) -> None:
        """Mark this point of the stream in `event`."""


class Stamp(Protocol):
    """When a stream reached a point; made only for timelines."""

    def at_s(self) -> float | None:
        """Seconds of `time.perf_counter`, None if the stream has not come there yet; never blocks."""


class HostStamp:
    """A time known when the stamp is made."""

    __slots__ = ("_at_s",)

    def __init__(self, at_s: float) -> None:
        self._at_s = at_s

    def at_s(self) -> float | None:
        return self._at_s


class Accelerator(Protocol):
    """One device that holds slots and computes experts. Each has its own streams, slots and link."""

    name: str
    device: torch.device
    is_on_the_clock: bool
    """Whether measured seconds mean anything: on hardware, and on the timed emulator."""
    built_in_profile: str | None
    """The profile that plans are predicted with where the user names none; None: this machine is measured."""
    can_plan: bool
    """Whether kernels here may plan tokens by themselves, as `runtime.device_planner` has them do."""
    compute: Stream
    """Where the model's own work runs, and the experts'."""

    def own_gpu_backend(self, costs: Callable[[Profile], Mapping[int, CostModel]]) -> GpuBackend | None:
        """Who computes experts here where that is nobody else's; `costs` scales a profile to every layer."""

    def watch_cpu(self, backend: CpuBackend) -> CpuBackend:
        """Return what stands for the CPU backend beside this accelerator: mostly itself. Called at least once."""

    def stream(self, name: str, *, low_priority: bool = False) -> Stream:
        """Return a new stream."""

    def event(self) -> Event:
        """Return a new event, never recorded."""

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """Return `num_bytes` of uninitialised device memory, uint8; CapacityError when there is not enough."""

    def release(self, memory: torch.Tensor) -> None:
        """Give back what `allocate` returned; all work on it has ended."""

    def page_locked(self, num_bytes: int) -> torch.Tensor:
        """Return `num_bytes` of host memory that copies may read or write asynchronously, uint8; CapacityError."""

    def register(self, memory: torch.Tensor) -> object | None:
        """Page-lock existing host memory in place, if the driver allows, for as long as the returned object is kept.

        None if not. Memory that is registered for one accelerator is so for all of the process.
        """

    def copy(self, stream: Stream, target: torch.Tensor, source: torch.Tensor, site: str) -> None:
        """Enqueue a copy between page-locked (or registered) host memory and the device; same shape and dtype."""

    def launch(
        self,
        stream: Stream,
        work: Callable[[], object],
        *,
        reads: Sequence[torch.Tensor],
        writes: Sequence[torch.Tensor],
        site: str,
    ) -> None:
        """Enqueue what `work` launches: it is called once, and everything it launches belongs to `stream`."""

    def capture(self) -> StepCapture | None:
        """What captures work of this device, with memory of its own for what it captures; None where nothing can."""

    def replay(self, graph: StepGraph, *, reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor]) -> None:
        """Enqueue a captured piece of the model's own work on `compute`."""

    def model_stream(self) -> AbstractContextManager[object]:
        """Have `compute` be a stream that can be captured, behind and before what is given to it outside."""

    def on_host(self, site: str, *, reads: Sequence[torch.Tensor] = (), writes: Sequence[torch.Tensor] = ()) -> None:
        """Declare that the host touches these now; checked by emulators only."""

    def hand_over(self, event: Event, wait: Callable[[Callable[[], bool], str], None]) -> None:
        """Make everything before `event` on `compute` visible to the model; `wait(is_done, what)` waits on the host."""

    def stamp(self, stream: Stream) -> Stamp:
        """Note when `stream` comes to this point."""

    @property
    def has_times(self) -> bool:
        """Whether stamps tell when work was done, rather than when it was given."""

    @property
    def stamps_are(self) -> str:
        """How stamps know the time, for the reader of a timeline."""

    def free_bytes(self) -> int:
        """Device memory that could be allocated now."""

    def auto_budget_bytes(self, reserve_bytes: int) -> int:
        """What `cache_size: auto` may use: what is free now, with the dense weights in place, less `reserve_bytes`.

        Emulated: half of what is free.
        """

    def describe(self) -> str:
        """A name a person recognises ("NVIDIA H100 80GB HBM3")."""
