"""CPU experts on ggml's kernels: every type that GGUF files hold, any width, where they stand in the mapped file.

Activations are rounded to 8 bits, as in llama.cpp: some 0.5 % relative error a product.
"""

from __future__ import annotations

import torch

from hybrimoe_kt.device.backend import CpuBackend, Routed
from hybrimoe_kt.device.experts import LayerExperts
from hybrimoe_kt.errors import HostCompatibilityError, KernelError, ModelError
from hybrimoe_kt.quants import QuantType

from .call_checks import INTEGERS, CheckedRows, check_call, check_finite, checked_rows
from .ggml import library as ggml
from .ggml.activations import refused_form
from .ggml.experts import ExpertGraphs, ExpertKind, Scratch, SumGraph
from .ggml.pool import FEW_TOKENS, pool
from .ggml.worker import Worker

__all__ = ["GgmlBackend"]


class GgmlBackend(CpuBackend):
    """Computes experts asynchronously on ggml's threads; one call in flight."""

    name = "ggml"
    answers_pairs = False
    takes_int32 = True

    def __init__(self, num_threads: int, max_tokens: int) -> None:
        threads = pool(num_threads)
        self.num_threads, self.max_tokens = threads.num_threads, max_tokens
        self._graphs, self._scratch = ExpertGraphs(threads), Scratch()
        self._layers: dict[int, _Layer] = {}
        self._worker = Worker("experts on ggml")
        self._call: _Call | _SumCall | None = None

    @classmethod
    def unusable(cls) -> str | None:
        return ggml.unusable()

    @classmethod
    def types(cls) -> tuple[QuantType, ...]:
        try:
            return ggml.library().types
        except HostCompatibilityError:
            return ()

    @classmethod
    def refuses(cls, experts: LayerExperts) -> str | None:
        if reason := refused_form(experts.form):
            return f"layer {experts.layer}: {reason}; use --cpu_backend torch_reference"
        computed = {row.number for row in cls.types()}
        for role, matrix in experts.named.items():
            if matrix.ggml_type not in computed:
                return (
                    f"layer {experts.layer}: {role} experts are {matrix.type_name}, which ggml's CPU kernels do not "
                    f"compute; use another file, or --cpu_backend torch_reference"
                )
            if not matrix.data.is_contiguous():
                return f"layer {experts.layer}: {role} experts are not contiguous in memory"
        return None

    def add_layer(self, experts: LayerExperts) -> None:
        """Take a layer's experts in place; ModelError for a type that ggml does not compute."""
        if reason := self.refuses(experts):
            raise ModelError(reason)
        self._layers[experts.layer] = _Layer(experts, self._graphs)

    def submit(self, layer: int, routed: Routed) -> None:
        """Start one layer's CPU share on a thread of its own; returns in microseconds."""
        call = self._call = self._prepared(layer, routed, is_finite=False)
        if call.has_work:
            self._worker.start(call.compute)

    def compute(self, layer: int, routed: Routed) -> torch.Tensor:
        """The same in the calling thread, which saves two changes of threads."""
        call = self._prepared(layer, routed, is_finite=True)
        if call.has_work:
            call.compute()
        return call.answer()

    def is_done(self) -> bool:
        return self._worker.is_done()

    def wait(self) -> torch.Tensor:
        call, self._call = self._call, None
        assert call is not None, "something was submitted"
        self._worker.join()
        return call.answer()

    def _prepared(self, layer: int, routed: Routed, *, is_finite: bool) -> _Call | _SumCall:
        if self._call is not None:
            raise KernelError("a CPU expert call is still in flight; wait for it before submitting another")
        known = self._layers[layer]
        rows = checked_rows(known.experts, self.max_tokens, routed)
        if rows is not None and not is_finite:
            check_finite(layer, routed.hidden)
        if rows is None:
            check_call(known.experts, self.max_tokens, routed, INTEGERS, is_finite=is_finite)
            if len(routed.ids) > 1:
                return _Call(known, routed, self._graphs, self._scratch)
            pairs = zip(routed.ids.tolist()[0], routed.weights.tolist()[0], strict=True)
            mine = [pair for pair in pairs if pair[0] >= 0]
            rows = CheckedRows(1, len(mine), [index for index, _ in mine], [share for _, share in mine])
        if rows.tokens > FEW_TOKENS:
            return _Call(known, routed, self._graphs, self._scratch)
        return _SumCall(known, routed.hidden, rows, self._scratch)


class _Layer:
    """A layer's experts as graphs take them."""

    def __init__(self, experts: LayerExperts, graphs: ExpertGraphs) -> None:
        self.experts, self.kind = experts, ExpertKind.of(experts)
        self.number = graphs.number_of(self.kind)
        self.addresses = tuple(tensor.data.data_ptr() for tensor in experts.tensors.values())
        self._graphs, self._size = graphs, (0, 0)
        self._latest: SumGraph | None = None

    def sum_of(self, per_token: int, tokens: int) -> SumGraph:
        """The graph of such calls, many of which are alike."""
        latest = self._latest
        if latest is None or self._size != (per_token, tokens):
            latest = self._latest = self._graphs.sum_of(self.kind, self.number, per_token, tokens)
            self._size = per_token, tokens
        return latest


class _SumCall:
    """The share of a few tokens: all that is read and written, alive while somebody computes it."""

    def __init__(self, layer: _Layer, hidden: torch.Tensor, rows: CheckedRows, scratch: Scratch) -> None:
        tokens, per_token, chosen, shares = rows
        self._layer, self._hidden, self.has_work = layer, hidden.contiguous(), per_token > 0
        self._answer = torch.empty_like(self._hidden) if self.has_work else torch.zeros_like(self._hidden)
        if self.has_work:
            graph = self._graph = layer.sum_of(per_token, tokens)
            graph.place(layer.addresses, self._hidden, chosen, shares, self._answer, scratch)

    def compute(self) -> None:
        self._graph.compute()

    def answer(self) -> torch.Tensor:
        """The weighted sum, float32 `[num_tokens, hidden]`, once computed."""
        return self._answer


class _Call:
    """The share of several tokens, likewise, whatever becomes of the backend."""

    def __init__(self, layer: _Layer, routed: Routed, graphs: ExpertGraphs, scratch: Scratch) -> None:
        hidden, ids, weights = routed[:3]
        self._layer = layer
        self._num_tokens, self._width = hidden.shape
        self._tokens: torch.Tensor | None = None
        """Of each pair, where pairs had to be picked."""
        mine = ids >= 0
        if not bool(mine.all()):
            self._tokens = mine.nonzero()[:, 0]
            hidden, ids, weights = hidden[self._tokens], ids[mine][:, None], weights[mine][:, None]
        self._ids = ids.to(torch.int32).contiguous()
        self._hidden, self._weights = hidden.contiguous(), weights
        self.has_work = self._ids.numel() > 0
        if self.has_work:
            tokens, per_token = self._ids.shape
            self._graph = graphs.of(layer.kind, layer.number, per_token, tokens)
            self._pairs = self._graph.place(layer.addresses, self._hidden, self._ids, scratch)

    def compute(self) -> None:
        self._graph.compute()

    def answer(self) -> torch.Tensor:
        """The weighted sum, float32 `[num_tokens, hidden]`, once computed."""
        if not self.has_work:
            return torch.zeros(self._num_tokens, self._width)
        if self._tokens is None:
            return torch.bmm(self._weights[:, None], self._pairs)[:, 0]
        answer = torch.zeros(self._num_tokens, self._width)
        return answer.index_add_(0, self._tokens, self._pairs[:, 0] * self._weights)
