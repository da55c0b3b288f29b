"""ggml's threads: one pool a process, which experts and dense products share, one graph at a time."""

from __future__ import annotations

import ctypes
import threading

import torch

from hybrimoe_kt.device.cores import physical_cores
from hybrimoe_kt.device.free_cores import FreeCores
from hybrimoe_kt.errors import KernelError

from .library import Context, Library, Plan, library

__all__ = ["FEW_TOKENS", "Graph", "Pool", "pool"]

FEW_TOKENS = 32
"""Up to which a step is one graph after another, and threads poll in between.

Of 8 to 48 tokens graphs and Transformers' modules took the same time within 10 %, of 64 and 96 the modules 0.84 to 0.96
of the graphs' (six layers of DeepSeek-V2-Lite and Qwen3-30B-A3B, two cores that multiply bfloat16).
"""

_POLL = 1
"""Rounds of polling before an idle thread sleeps, in ggml's unit of 131,072: some milliseconds.

Between the many short graphs of few tokens that gave 5 to 14 % more tokens a second on two cores of an EPYC. In a
prompt, where torch's threads work between graphs, it took 10 to 25 %: there threads sleep at once.
"""
_SPARE_BYTES = 64
"""ggml aligns its scratch memory itself, within this."""


class Pool:
    """A number of threads, of which the calling one is the first. Several callers take turns."""

    def __init__(self, of: Library, num_threads: int) -> None:
        self.library, self.num_threads = of, num_threads
        self._threads = {is_short: _threads(of, num_threads, _POLL if is_short else 0) for is_short in (False, True)}
        self._alone = _threads(of, 1, 0)
        self._free = FreeCores()
        self._turn = threading.Lock()
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._address = 0

    def plan(self, graph: int) -> Plan:
        """How `graph` is computed."""
        with self._turn:
            plan: Plan = self.library.ggml_graph_plan(graph, self.num_threads, self._threads[False])
            if plan.work_size + _SPARE_BYTES > self._scratch.numel():
                self._scratch = torch.empty(plan.work_size + _SPARE_BYTES, dtype=torch.uint8)
                self._address = self._scratch.data_ptr()
        return plan

    def compute(self, graph: int, plan: Plan, reference: object, *, is_short: bool, is_tiny: bool = False) -> None:
        """Compute a graph without the interpreter's lock, by the threads that find a core; `reference` is `plan`'s.

        Of short ones the next is expected soon; tiny ones are done before another thread would have begun.
        """
        with self._turn:
            plan.work_data = self._address
            plan.n_threads = num_threads = 1 if is_tiny else self._free.of(self.num_threads)
            plan.threadpool = self._threads[is_short] if num_threads > 1 else self._alone
            status = self.library.ggml_graph_compute(graph, reference)
        if status != 0:
            raise KernelError(f"ggml ended a computation with status {status}")


def _threads(of: Library, number: int, poll: int) -> int:
    """So many threads, the caller being the first. Never given back: pools live as long as the process."""
    parameters = of.ggml_threadpool_params_default(number)
    parameters.poll = poll
    made: int = of.ggml_threadpool_new(ctypes.byref(parameters))
    return made


class Graph:
    """A graph of a few tensors, planned once; where its tensors' values are may change from call to call."""

    def __init__(
        self, on: Pool, context: Context, *results: int, is_short: bool = False, is_tiny: bool = False
    ) -> None:
        """`is_short`: it serves few tokens; `is_tiny`: it takes microseconds."""
        self._pool, self._context = on, context  # the context goes when nobody computes with it any more
        self._graph, self._is_short, self._is_tiny = context.graph(*results), is_short, is_tiny
        self.plan()

    def plan(self) -> None:
        """Plan it anew, as its tensors have other sizes now."""
        self._plan = self._pool.plan(self._graph)
        self._reference = ctypes.byref(self._plan)

    def compute(self) -> None:
        self._pool.compute(self._graph, self._plan, self._reference, is_short=self._is_short, is_tiny=self._is_tiny)


_made: dict[int, Pool] = {}
_current: list[Pool] = []
_lock = threading.Lock()


def pool(num_threads: int = 0) -> Pool:
    """The process's pool, with the number of threads that was named last; all physical cores if none was."""
    with _lock:
        if num_threads or not _current:
            wanted = num_threads or physical_cores()
            if wanted not in _made:
                _made[wanted] = Pool(library(), wanted)
            _current[:] = [_made[wanted]]
        return _current[0]
