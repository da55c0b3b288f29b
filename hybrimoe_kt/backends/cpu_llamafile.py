"""CPU experts on kTransformers' llamafile kernels, through kt-kernel's low-level extension.

Every call is checked by `call_checks`, every layer by `llamafile_input`. kt-kernel reads the mapped GGUF in place, so
experts are not copied, except where an expert's width must be padded.

Numbers below marked [m] were measured on a 2-core AVX2 machine with kt-kernel 0.7.2.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from hybrimoe_kt.device.backend import Routed
from hybrimoe_kt.device.experts import LayerExperts
from hybrimoe_kt.errors import KernelError

from . import kt_kernel_pool
from .call_checks import check_call
from .kt_kernel_pool import extension, stdout_silenced, worker_pool
from .llamafile_input import LlamafileArithmetic, kernel_matrices

__all__ = ["LlamafileBackend", "LlamafileTwiceBackend"]

logger = logging.getLogger(__name__)

_F32 = 0


class LlamafileBackend(LlamafileArithmetic):
    """Computes experts asynchronously on kt-kernel's own threads; one call in flight.

    Quantises activations to 8 bits: 1-2 % relative error per layer against exact arithmetic [m].
    """

    name = "llamafile"
    answers_pairs = False
    presents_twice = False
    """Whether a single token is presented twice, the second time with weights 0.

    The kernel's one-row path read memory at half the speed of its many-row path on an AVX2 machine, so that two rows
    took half the time of one [m]; on an AVX-512 one they took 1.1 times that. `hybrimoe calibrate` finds out.
    """
    _pool_threads = 0

    def __init__(self, num_threads: int, max_tokens: int) -> None:
        """`max_tokens` bounds one call; longer ones are refused, because the kernel would corrupt memory."""
        self._extension = extension()
        if LlamafileBackend._pool_threads not in (0, num_threads):
            logger.warning(
                "kt-kernel's pool already runs %d threads in this process; %d were asked for and ignored",
                LlamafileBackend._pool_threads,
                num_threads,
            )
            num_threads = LlamafileBackend._pool_threads
        LlamafileBackend._pool_threads = num_threads
        self.num_threads, self.max_tokens = num_threads, max_tokens
        self._pool = worker_pool(num_threads)
        self._kernels: dict[int, Any] = {}
        self._layers: dict[int, LayerExperts] = {}
        self._matrices: dict[int, tuple[int, tuple[torch.Tensor, ...]]] = {}
        self._task: Any = None
        # kt-kernel never frees a task: each is made once and submitted again, 160 bytes less a call [m].
        self._tasks: dict[tuple[int, int], Any] = {}
        self._buffers = _Buffers(0, 0, 0)
        self._flag = _Flag(0)

    @classmethod
    def unusable(cls) -> str | None:
        return kt_kernel_pool.unusable()

    def add_layer(self, experts: LayerExperts) -> None:
        """Take a layer's experts in place; ModelError for a type or shape the kernel gets wrong."""
        self.check_layer(experts)
        self._layers[experts.layer] = experts
        self._kernels[experts.layer] = self._kernel(experts)
        self._buffers = self._buffers.at_least(self._num_rows(experts), experts.top_k, experts.hidden)
        self._flag = _Flag(self._buffers.width)
        self._tasks.clear()  # they name the buffers by address

    def copies(self, layer: int) -> bool:
        """Whether this layer's width had to be padded: its experts then stand in memory of this backend's own."""
        return self.copied_bytes(self._layers[layer]) > 0

    def _num_rows(self, experts: LayerExperts) -> int:
        """Rows of the longest call: every token, and once more at most one token per expert (see `_Buffers.fill`)."""
        return self.max_tokens + min(self.max_tokens, experts.num_experts)

    def _kernel(self, experts: LayerExperts) -> Any:
        width, matrices = self._matrices[experts.layer] = kernel_matrices(experts)
        config = self._extension.moe.MOEConfig(experts.num_experts, experts.top_k, experts.hidden, width)
        config.pool = self._pool.backend_
        config.m_block = 32
        config.group_min_len = 1  # its default of 10 runs up to 9 tokens one by one: 4x slower at 8 tokens [m]
        config.max_len = config.group_max_len = self._num_rows(experts)
        config.gate_proj, config.up_proj, config.down_proj = (data.data_ptr() for data in matrices)
        config.gate_type, config.up_type, config.down_type = (matrix.ggml_type for matrix in experts.matrices)
        config.hidden_type = _F32
        with stdout_silenced():
            kernel = self._extension.moe.MOE(config)
            self._pool.submit(kernel.load_weights_task())
            self._pool.sync()
        return kernel

    def submit(self, layer: int, routed: Routed) -> None:
        """Start one layer's CPU share on the pool; returns in microseconds."""
        if self._task is not None:
            raise KernelError("a CPU expert call is still in flight; wait for it before submitting another")
        experts = self._layers[layer]
        check_call(experts, self.max_tokens, routed)
        num_tokens, width = routed.hidden.shape
        self._shape = num_tokens, width
        num_rows = (
            self._buffers.fill(routed) if num_tokens > 1 else self._buffers.fill_single(routed, self.presents_twice)
        )
        self.start_rows(layer, num_rows, routed.ids.shape[1])

    def start_rows(self, layer: int, num_rows: int, top_k: int) -> None:
        """Submit what stands in the first `num_rows` of the buffers, unchecked; `submit` is the safe way in."""
        buffers = self._buffers
        buffers.length[0] = num_rows
        self._task = self._tasks.get((layer, top_k))
        if self._task is None:
            # The kernel reads every pointer, the length too, when the task runs: they all are this object's buffers.
            self._task = self._tasks[layer, top_k] = self._kernels[layer].forward_task(
                buffers.length.data_ptr(),
                top_k,
                buffers.ids.data_ptr(),
                buffers.weights.data_ptr(),
                buffers.hidden.data_ptr(),
                buffers.out.data_ptr(),
                False,
            )
        self._pool.submit(self._task)
        self._flag.submit(layer, self._kernels[layer], self._pool)

    def is_done(self) -> bool:
        """Whether the call has ended; kt-kernel's own `sync` would keep the interpreter's lock until then."""
        return self._flag.is_up()

    def wait(self) -> torch.Tensor:
        """Return the answer; blocks, with the interpreter's lock, if the call is not done."""
        if not self._flag.is_up():
            self._pool.sync()
        self._task = None
        num_tokens, width = self._shape
        return self._buffers.out[: num_tokens * width].view(num_tokens, width)


class LlamafileTwiceBackend(LlamafileBackend):
    """The same with single tokens presented twice."""

    name = "llamafile presented twice"
    for_one_token = True
    presents_twice = True


class _Flag:
    """Goes up when everything submitted before it has ended.

    The pool runs its tasks first in, first out, so the flag is one more task: a token routed nowhere, whose zeros
    overwrite a mark. It takes 13-17 us of the pool [m].
    """

    def __init__(self, width: int) -> None:
        self._length = torch.ones(1, dtype=torch.int32)
        self._ids = torch.full((1,), -1, dtype=torch.int64)
        self._weights, self._hidden, self._out = torch.zeros(1), torch.zeros(width), torch.zeros(width)
        self._mark = self._out.numpy()
        self._tasks: dict[int, Any] = {}

    def submit(self, layer: int, kernel: Any, pool: Any) -> None:
        self._mark[0] = 1.0
        task = self._tasks.get(layer)
        if task is None:
            pointers = [tensor.data_ptr() for tensor in (self._ids, self._weights, self._hidden, self._out)]
            task = self._tasks[layer] = kernel.forward_task(self._length.data_ptr(), 1, *pointers, False)
        pool.submit(task)

    def is_up(self) -> bool:
        return bool(self._mark[0] == 0.0)


class _Buffers:
    """Call buffers, allocated once; flat, so that a call of any length is contiguous."""

    def __init__(self, rows: int, top_k: int, hidden: int) -> None:
        self.rows, self.top_k, self.width = rows, top_k, hidden
        self.length = torch.zeros(1, dtype=torch.int32)
        self.hidden = torch.zeros(rows * hidden)
        self.out = torch.zeros(rows * hidden)
        self.ids = torch.zeros(rows * top_k, dtype=torch.int64)
        self.weights = torch.zeros(rows * top_k)

    def at_least(self, rows: int, top_k: int, hidden: int) -> _Buffers:
        if rows <= self.rows and top_k <= self.top_k and hidden <= self.width:
            return self
        return _Buffers(max(rows, self.rows), max(top_k, self.top_k), max(hidden, self.width))

    def fill_single(self, routed: Routed, twice: bool) -> int:
        """One token, or the same twice, see `LlamafileBackend.presents_twice`."""
        hidden, ids, weights = routed[:3]
        top_k, width, rows = ids.shape[1], hidden.shape[1], 1 + twice
        self.hidden[: rows * width].view(rows, width).copy_(hidden.expand(rows, width))
        self.ids[: rows * top_k].view(rows, top_k).copy_(ids.expand(rows, top_k))
        self.weights[:top_k].copy_(weights[0])
        self.weights[top_k : rows * top_k].zero_()
        return rows

    def fill(self, routed: Routed) -> int:
        """Many tokens: repeat, with weights 0, every token that alone uses some expert: two rows cost less than one.

        Some two thirds on an AVX2 machine [m].
        """
        hidden, ids, weights = routed[:3]
        num_tokens, top_k = ids.shape
        loads = torch.bincount(ids.flatten() + 1, minlength=2)
        alone = (loads[ids + 1] == 1) & (ids >= 0)
        repeated = alone.any(dim=1).nonzero().flatten()
        rows = num_tokens + repeated.numel()
        width = hidden.shape[1]
        x, i, w = self.hidden[: rows * width], self.ids[: rows * top_k], self.weights[: rows * top_k]
        torch.cat((hidden, hidden[repeated]), out=x.view(rows, width))
        torch.cat((ids, torch.where(alone, ids, -1)[repeated]), out=i.view(rows, top_k))
        w.view(rows, top_k)[:num_tokens].copy_(weights)
        w.view(rows, top_k)[num_tokens:].zero_()
        return rows
