"""The one host copy of every routed expert: views of the mapped GGUF file, in the file's own layout.

An expert is three matrices, gate and up `[inter, hidden]` and down `[hidden, inter]`, each a run of GGUF
blocks. The store owns nothing but references; whoever opened the file owns the mapping, and the views keep it
alive.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hybrimoe_kt.core.types import ExpertId
from hybrimoe_kt.errors import ModelError

from .quant_types import row_bytes, type_name

__all__ = ["ExpertMatrix", "HostStore", "LayerExperts"]


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
        for name, matrix, shape in (
            ("gate", self.gate, (self.inter, self.hidden)),
            ("up", self.up, (self.inter, self.hidden)),
            ("down", self.down, (self.hidden, self.inter)),
        ):
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
        """Gate, up, down: the order in which a slot holds them."""
        return self.gate, self.up, self.down

    @property
    def expert_bytes(self) -> int:
        """Bytes one slot needs."""
        return sum(matrix.num_bytes for matrix in self.matrices)


class HostStore:
    """Every layer's experts, by layer number."""

    def __init__(self) -> None:
        self.layers: dict[int, LayerExperts] = {}

    def add(self, experts: LayerExperts) -> None:
        self.layers[experts.layer] = experts

    def parts(self, expert: ExpertId) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the expert's gate, up and down bytes, uint8 views `[num_bytes]` of the store."""
        gate, up, down = self.layers[expert.layer].matrices
        return gate.data[expert.index], up.data[expert.index], down.data[expert.index]

    @property
    def num_bytes(self) -> int:
        """Bytes of all routed experts."""
        return sum(layer.expert_bytes * layer.num_experts for layer in self.layers.values())
