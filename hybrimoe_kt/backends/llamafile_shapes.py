"""Which experts kTransformers' llamafile kernels compute right, and how a width they do not take is padded."""

from __future__ import annotations

import math

import torch

from hybrimoe_kt.device.experts import ROLES, ExpertMatrix, LayerExperts
from hybrimoe_kt.errors import ModelError
from hybrimoe_kt.quants import TYPES, row_bytes

__all__ = ["check_layer", "copied_bytes", "padded", "padded_width", "refusal"]

_WIDTH_STEP = 256
_MAX_TOP_K = 64


def padded_width(experts: LayerExperts) -> int:
    """The experts' width as the kernel needs it, a multiple of 256."""
    return math.ceil(experts.inter / _WIDTH_STEP) * _WIDTH_STEP


def refusal(experts: LayerExperts) -> str | None:
    """Return why the kernels do not compute a layer's experts, None when they do."""
    try:
        check_layer(experts)
    except ModelError as error:
        return str(error)
    return None


def copied_bytes(experts: LayerExperts) -> int:
    """Bytes of the copy this backend makes of a layer whose width it must pad, 0 where it reads the file in place."""
    width = padded_width(experts)
    return 0 if width == experts.inter else experts.num_experts * experts.expert_bytes * width // experts.inter


def check_layer(experts: LayerExperts) -> None:
    """Raise ModelError for experts whose types or shapes the kernels get wrong."""
    for role, matrix in zip(ROLES, experts.matrices, strict=True):
        if not TYPES[matrix.ggml_type].llamafile:
            raise ModelError(
                f"layer {experts.layer}: {role} experts are {matrix.type_name}, which the llamafile CPU backend "
                f"cannot run; valid: F32, F16, Q8_0, Q4_0, Q5_0, Q2_K to Q6_K; use another file, "
                f"or --cpu_backend torch_reference"
            )
        if not matrix.data.is_contiguous():
            raise ModelError(f"layer {experts.layer}: {role} experts are not contiguous in memory")
    if experts.gate.ggml_type != experts.up.ggml_type:
        raise ModelError(
            f"layer {experts.layer}: gate experts are {experts.gate.type_name} and up experts {experts.up.type_name}; "
            f"the llamafile CPU backend wants one type for both; use --cpu_backend torch_reference"
        )
    if experts.hidden % _WIDTH_STEP:
        raise ModelError(
            f"layer {experts.layer}: hidden size {experts.hidden} is not a multiple of {_WIDTH_STEP}, which the "
            f"llamafile CPU backend needs (it would return wrong numbers); use --cpu_backend torch_reference"
        )
    if experts.top_k > _MAX_TOP_K:
        raise ModelError(
            f"layer {experts.layer}: top-{experts.top_k} routing; the llamafile backend takes up to {_MAX_TOP_K}"
        )


def padded(matrix: ExpertMatrix, experts: LayerExperts, width: int) -> torch.Tensor:
    """Copy every expert's matrix with the expert width grown to `width` by zero bytes.

    Zero bytes are zero weights in every block format here (their scales are zero), so results do not change.
    """
    extra = width - experts.inter
    if matrix.rows == experts.inter:  # gate, up: more rows
        return torch.nn.functional.pad(matrix.data, (0, extra * row_bytes(matrix.ggml_type, matrix.columns)))
    try:
        row = row_bytes(matrix.ggml_type, width)
        rows = matrix.data.view(experts.num_experts, matrix.rows, -1)
    except ValueError as error:  # pragma: no cover - a block larger than the padding step does not exist
        raise ModelError(str(error)) from error
    return torch.nn.functional.pad(rows, (0, row - rows.shape[2])).flatten(1).contiguous()
