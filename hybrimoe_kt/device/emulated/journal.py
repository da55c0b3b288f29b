"""An accelerator that does its work at once and writes down the order in which it was given.

A right answer does not show what overlapped. The order of the entries does: what was enqueued before what, and what
between the submission of a CPU share and its end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch

from hybrimoe_kt.device.backend import CpuBackend, Routed
from hybrimoe_kt.device.experts import LayerExperts
from hybrimoe_kt.device.step_graph import StepGraph

from .immediate import ImmediateAccelerator, _Done

__all__ = ["Entry", "JournalAccelerator", "JournalCpu"]


class Entry(NamedTuple):
    """One piece of work: `num_bytes` copied, or written by a launch; "submit" and "done" are the "CPU experts"."""

    stream: str
    site: str
    num_bytes: int
    kind: Literal["copy", "launch", "submit", "done"]


class _Named(_Done):
    """A stream that never waits, and knows its name."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class JournalAccelerator(ImmediateAccelerator):
    """Immediate, with `entries` in the order given; a `JournalCpu` of it writes into the same list."""

    def __init__(self, name: str = "emulated") -> None:
        super().__init__(name)
        self.compute = _Named("compute")
        self.entries: list[Entry] = []

    @property
    def sites(self) -> list[str]:
        """The sites alone, in order."""
        return [entry.site for entry in self.entries]

    def stream(self, name: str, *, low_priority: bool = False) -> Any:
        return _Named(name)

    def copy(self, stream: Any, target: torch.Tensor, source: torch.Tensor, site: str) -> None:
        self.entries.append(Entry(stream.name, site, target.nbytes, "copy"))
        super().copy(stream, target, source, site)

    def launch(
        self,
        stream: Any,
        work: Callable[[], object],
        *,
        reads: Sequence[torch.Tensor],
        writes: Sequence[torch.Tensor],
        site: str,
    ) -> None:
        self.entries.append(Entry(stream.name, site, sum(tensor.nbytes for tensor in writes), "launch"))
        super().launch(stream, work, reads=reads, writes=writes, site=site)

    def replay(self, graph: StepGraph, *, reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor]) -> None:
        self.entries.append(Entry("compute", "piece", sum(tensor.nbytes for tensor in writes), "launch"))
        super().replay(graph, reads=reads, writes=writes)


class JournalCpu(CpuBackend):
    """A CPU backend whose calls stand in an accelerator's journal; each ends at the poll after `num_polls` others."""

    def __init__(self, backend: CpuBackend, journal: JournalAccelerator, num_polls: int = 3) -> None:
        self.backend, self.name, self.answers_pairs = backend, backend.name, backend.answers_pairs
        self._entries, self._num_polls, self._polls_left = journal.entries, num_polls, 0

    def copies(self, layer: int) -> bool:
        return self.backend.copies(layer)

    def add_layer(self, experts: LayerExperts) -> None:
        self.backend.add_layer(experts)

    def submit(self, layer: int, routed: Routed) -> None:
        self._entries.append(Entry("CPU", "CPU experts", 0, "submit"))
        self._polls_left = self._num_polls
        self.backend.submit(layer, routed)

    def is_done(self) -> bool:
        self._polls_left -= 1
        return self._polls_left < 0 and self.backend.is_done()

    def wait(self) -> torch.Tensor:
        """Notes the end: where the executor has seen it."""
        self._entries.append(Entry("CPU", "CPU experts", 0, "done"))
        return self.backend.wait()
