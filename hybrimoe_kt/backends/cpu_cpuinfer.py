"""CPU experts on the legacy framework's own llamafile kernels, `cpuinfer_ext` of ktransformers 0.2.x.

The same arithmetic as kt-kernel's, an older interface: no id means "skip", so a step's CPU share is submitted as one
call per number of experts that tokens have here. A pool of n threads computes with n - 1, and with 0 the process
dies, so one more than asked for is made.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from hybrimoe_kt.device.backend import Routed
from hybrimoe_kt.device.experts import LayerExperts
from hybrimoe_kt.errors import HostCompatibilityError, KernelError

from .call_checks import check_call
from .llamafile_input import LlamafileArithmetic, kernel_matrices

__all__ = ["CpuInferBackend", "adopt_pool"]

_F32 = 0
_STRIDE = 64  # rows a thread takes at a time, as the framework itself has it
_GROUP_MIN_LEN = 2  # from two tokens on together; the framework's 10 runs up to nine one by one


@functools.cache
def _extension() -> Any:
    try:
        import cpuinfer_ext
    except ImportError as error:
        raise HostCompatibilityError(
            f"the cpuinfer CPU backend needs cpuinfer_ext of ktransformers 0.2.x ({error}); build that package's "
            f"C++ part, or use cpu_backend llamafile or torch_reference"
        ) from None
    return cpuinfer_ext


_adopted: list[Any] = []


def adopt_pool(pool: Any) -> None:
    """Compute on the threads of a pool that exists already: the framework makes one whether or not it is used."""
    _adopted[:] = [pool]


@functools.cache
def _own_pool(num_threads: int) -> Any:
    return _extension().CPUInfer(num_threads + 1)


class CpuInferBackend(LlamafileArithmetic):
    """Computes experts asynchronously on cpuinfer_ext's threads; one step in flight. Checks are kt-kernel's."""

    name = "cpuinfer"
    answers_pairs = False

    def __init__(self, num_threads: int, max_tokens: int) -> None:
        _extension()
        self.num_threads, self.max_tokens = num_threads, max_tokens
        self._pool = _adopted[0] if _adopted else _own_pool(num_threads)
        self._kernels: dict[int, Any] = {}
        self._layers: dict[int, LayerExperts] = {}
        self._matrices: dict[int, tuple[int, tuple[torch.Tensor, ...]]] = {}
        self._calls: list[_Call] | None = None

    @classmethod
    def unusable(cls) -> str | None:
        try:
            _extension()
        except HostCompatibilityError as error:
            return str(error)
        return None

    def copies(self, layer: int) -> bool:
        return self.copied_bytes(self._layers[layer]) > 0

    def add_layer(self, experts: LayerExperts) -> None:
        self.check_layer(experts)
        self._layers[experts.layer] = experts
        self._kernels[experts.layer] = self._kernel(experts)

    def _kernel(self, experts: LayerExperts) -> Any:
        width, matrices = self._matrices[experts.layer] = kernel_matrices(experts)
        moe = _extension().moe
        return moe.MOE(
            moe.MOEConfig(
                experts.num_experts,
                experts.top_k,
                experts.hidden,
                width,
                _STRIDE,
                _GROUP_MIN_LEN,
                self.max_tokens,
                *(data.data_ptr() for data in matrices),
                *(matrix.ggml_type for matrix in experts.matrices),
                _F32,
            )
        )

    def submit(self, layer: int, routed: Routed) -> None:
        """Start one layer's CPU share; ids of -1 are not computed here."""
        if self._calls is not None:
            raise KernelError("a CPU expert call is still in flight; wait for it before submitting another")
        check_call(self._layers[layer], self.max_tokens, routed)
        self._shape = routed.hidden.shape
        self._calls = []
        counts = (routed.ids >= 0).sum(dim=1)
        for count in counts.unique().tolist():
            if count:
                self._calls.append(_Call(count, counts == count, routed))
        for call in self._calls:
            self._pool.submit(self._kernels[layer].forward(*call.arguments))

    def is_done(self) -> bool:
        """Always, after waiting: this pool can only be waited for, so nothing is overlapped with asking."""
        self._pool.sync()
        return True

    def wait(self) -> torch.Tensor:
        self._pool.sync()
        calls, self._calls = self._calls or [], None
        if len(calls) == 1 and calls[0].out.shape == self._shape:
            return calls[0].out
        result = torch.zeros(self._shape, dtype=torch.float32)
        for call in calls:
            result[call.rows] = call.out
        return result


class _Call:
    """The tokens with `count` experts here, and the buffers that the kernel reads and writes until it is waited for."""

    def __init__(self, count: int, rows: torch.Tensor, routed: Routed) -> None:
        self.rows = rows.nonzero().flatten()
        ids = routed.ids[rows]
        places = (ids < 0).to(torch.uint8).argsort(dim=1, stable=True)[:, :count]
        self.ids = ids.gather(1, places).contiguous()
        self.weights = routed.weights[rows].gather(1, places).contiguous()
        self.hidden = routed.hidden[rows].contiguous()
        self.out = torch.empty_like(self.hidden)

    @property
    def arguments(self) -> tuple[int, ...]:
        num_tokens, count = self.ids.shape
        return (num_tokens, count, *(t.data_ptr() for t in (self.ids, self.weights, self.hidden, self.out)))
