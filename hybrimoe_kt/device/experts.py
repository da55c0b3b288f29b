"""The routed experts of a layer as bytes: gate and up `[inter, hidden]` and down `[hidden, inter]`, in GGUF blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hybrimoe_kt.errors import ModelError
from hybrimoe_kt.quants import row_bytes, type_name

__all__ = ["ROLES", "ExpertMatrix", "ExpertParts", "LayerExperts"]

ROLES = ("gate", "up", "down")
"""An expert's matrices, in the order in which everything names them and a slot holds them."""

ExpertParts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""One expert's gate, up and down."""


@dataclass(frozen=True, slots=True)
class ExpertMatrix:
    """One matrix of every expert of a layer: `data` uint8 `[num_experts, rows * row_bytes]`, on the CPU."""

    data: torch.Tensor
    ggml_type: int
    rows: int
    columns: int

    @property
    def num_bytes(self) -> int:
        """Bytes of one expert's matrix."""
        return self.rows * row_bytes(self.ggml_type, self.columns)

    @property
    def type_name(self) -> str:
        return type_name(self.ggml_type)


@dataclass(frozen=True, slots=True)
class LayerExperts:
    """The routed experts of one MoE layer; `layer` is the decoder layer's number in the model."""

    layer: int
    num_experts: int
    top_k: int
    hidden: int
    inter: int
    gate: ExpertMatrix
    up: ExpertMatrix
    down: ExpertMatrix

    def __post_init__(self) -> None:
        wide, narrow = (self.inter, self.hidden), (self.hidden, self.inter)
        for name, matrix, shape in zip(ROLES, self.matrices, (wide, wide, narrow), strict=True):
            if (matrix.rows, matrix.columns) != shape or tuple(matrix.data.shape) != (
                self.num_experts,
                matrix.num_bytes,
            ):
                raise ModelError(
                    f"layer {self.layer}: expert {name} matrices are {matrix.data.shape[0]} of "
                    f"{matrix.rows}x{matrix.columns}, the configuration wants {self.num_experts} of "
                    f"{shape[0]}x{shape[1]}; the GGUF file and the configuration belong to different models"
                )

    @property
    def matrices(self) -> tuple[ExpertMatrix, ExpertMatrix, ExpertMatrix]:
        return self.gate, self.up, self.down

    def parts(self, index: int) -> ExpertParts:
        """Return one expert's bytes in GGUF order, uint8 views `[num_bytes]`."""
        return self.gate.data[index], self.up.data[index], self.down.data[index]

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert in the file."""
        return sum(matrix.num_bytes for matrix in self.matrices)
