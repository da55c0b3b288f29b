"""What kTransformers' llamafile kernels compute right, and how what they do not take is padded or refused."""

from __future__ import annotations

import math

import torch

from hybrimoe_kt.device.backend import CpuBackend
from hybrimoe_kt.device.cores import spinning_threads
from hybrimoe_kt.device.experts import ExpertMatrix, LayerExperts
from hybrimoe_kt.errors import ModelError
from hybrimoe_kt.quants import TYPES, QuantType, llamafile_types, row_bytes

__all__ = ["LlamafileArithmetic", "kernel_matrices"]

_WIDTH_STEP = 256
_MAX_TOP_K = 64


class LlamafileArithmetic(CpuBackend):
    """What is known of the kernels before any is made, whichever library they come from."""

    num_threads: int

    @property
    def spinning_threads(self) -> int:  # type: ignore[override]
        return self.num_threads

    @classmethod
    def types(cls) -> tuple[QuantType, ...]:
        return llamafile_types()

    @classmethod
    def refuses(cls, experts: LayerExperts) -> str | None:
        layer = f"layer {experts.layer}:"
        if not experts.form.is_swiglu or experts.biases:
            return (
                f"{layer} experts of another form ({experts.form.describe()}) than the gated silu that the llamafile "
                f"CPU backend computes; use --cpu_backend ggml"
            )
        for role, matrix in experts.named.items():
            if not TYPES[matrix.ggml_type].llamafile:
                return (
                    f"{layer} {role} experts are {matrix.type_name}, which the llamafile CPU backend "
                    f"cannot run; valid: F32, F16, Q8_0, Q4_0, Q5_0, Q2_K to Q6_K; --cpu_backend ggml takes more"
                )
            if not matrix.data.is_contiguous():
                return f"{layer} {role} experts are not contiguous in memory"
        if experts.gate is not None and experts.gate.ggml_type != experts.up.ggml_type:
            return (
                f"{layer} gate experts are {experts.gate.type_name} and up experts {experts.up.type_name}; "
                f"the llamafile CPU backend wants one type for both; use --cpu_backend ggml"
            )
        if experts.hidden % _WIDTH_STEP:
            return (
                f"{layer} hidden size {experts.hidden} is not a multiple of {_WIDTH_STEP}, which the "
                f"llamafile CPU backend needs (it would return wrong numbers); use --cpu_backend ggml"
            )
        if experts.top_k > _MAX_TOP_K:
            return f"{layer} top-{experts.top_k} routing; the llamafile backend takes up to {_MAX_TOP_K}"
        return None

    @classmethod
    def check_layer(cls, experts: LayerExperts) -> None:
        """Raise ModelError for experts whose types or shapes the kernels get wrong."""
        if reason := cls.refuses(experts):
            raise ModelError(reason)

    @classmethod
    def default_threads(cls, *, beside_accelerator: bool) -> int:
        return spinning_threads()

    @classmethod
    def copied_bytes(cls, experts: LayerExperts) -> int:
        """A layer whose width must be padded is copied; others are read in the file."""
        width = _padded_width(experts)
        return 0 if width == experts.inter else experts.num_experts * experts.expert_bytes * width // experts.inter


def _padded_width(experts: LayerExperts) -> int:
    """The experts' width as the kernel needs it, a multiple of 256."""
    return math.ceil(experts.inter / _WIDTH_STEP) * _WIDTH_STEP


def kernel_matrices(experts: LayerExperts) -> tuple[int, tuple[torch.Tensor, ...]]:
    """Return the width that the kernel is told, and gate, up and down: in place, or copies where that is padded."""
    width = _padded_width(experts)
    if width == experts.inter:
        return width, tuple(matrix.data for matrix in experts.matrices)
    return width, tuple(_padded(matrix, experts, width) for matrix in experts.matrices)


def _padded(matrix: ExpertMatrix, experts: LayerExperts, width: int) -> torch.Tensor:
    """Copy every expert's matrix with the expert width grown to `width` by zero bytes.

    Zero bytes are zero weights in every block format here (their scales are zero), so results do not change.
    """
    extra = width - experts.inter
    if matrix.rows == experts.inter:  # gate, up: more rows
        return torch.nn.functional.pad(matrix.data, (0, extra * row_bytes(matrix.ggml_type, matrix.columns)))
    row = row_bytes(matrix.ggml_type, width)
    rows = matrix.data.view(experts.num_experts, matrix.rows, -1)
    return torch.nn.functional.pad(rows, (0, row - rows.shape[2])).flatten(1).contiguous()
