"""The routed experts of a layer as bytes: gate and up `[inter, hidden]` and down `[hidden, inter]`, in GGUF blocks.

Some have no gate, some have a bias for every matrix, float32.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import itemgetter

import torch

from hybrimoe_kt.errors import ModelError
from hybrimoe_kt.expert_form import SWIGLU, ExpertForm
from hybrimoe_kt.quants import row_bytes, type_name

__all__ = ["FLOAT32", "ROLES", "ExpertMatrix", "ExpertParts", "LayerExperts", "bias_of"]

ROLES = ("gate", "up", "down")
"""An expert's matrices, in the order in which everything names them and a slot holds them."""
FLOAT32 = 0
"""GGML's number of the type of biases."""

ExpertParts = tuple[torch.Tensor, ...]
"""One expert's gate (if it has one), up and down, and their biases if it has any."""


def bias_of(role: str) -> str:
    """The name of a matrix's bias among an expert's tensors."""
    return f"{role}_bias"


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
    gate: ExpertMatrix | None
    """None: experts without a gate, see `form`."""
    up: ExpertMatrix
    down: ExpertMatrix
    form: ExpertForm = SWIGLU
    biases: tuple[ExpertMatrix, ...] = ()
    """One for each matrix where the form has them, in order: float32, one row."""
    _data: tuple[torch.Tensor, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_data", tuple(matrix.data for matrix in (*self.matrices, *self.biases)))
        if (self.gate is not None) != self.form.is_gated:
            have = "a gate" if self.gate is not None else "no gate"
            raise ModelError(f"layer {self.layer}: experts have {have} in the file and not in the configuration")
        wide, narrow = (self.inter, self.hidden), (self.hidden, self.inter)
        for name, matrix in self.named.items():
            self._check(name, matrix, narrow if name == "down" else wide)
        wanted = len(self.matrices) if self.form.has_biases else 0
        if len(self.biases) != wanted:
            raise ModelError(f"layer {self.layer}: {len(self.biases)} biases of experts, their form has {wanted}")
        for name, matrix, bias in zip(self.named, self.matrices, self.biases, strict=False):
            self._check(bias_of(name), bias, (1, matrix.rows))
            if bias.ggml_type != FLOAT32:
                raise ModelError(f"layer {self.layer}: expert {name} biases are {bias.type_name}, wanted F32")

    def _check(self, name: str, matrix: ExpertMatrix, shape: tuple[int, int]) -> None:
        if (matrix.rows, matrix.columns) != shape or tuple(matrix.data.shape) != (self.num_experts, matrix.num_bytes):
            raise ModelError(
                f"layer {self.layer}: expert {name} matrices are {matrix.data.shape[0]} of "
                f"{matrix.rows}x{matrix.columns}, the configuration wants {self.num_experts} of "
                f"{shape[0]}x{shape[1]}; the GGUF file and the configuration belong to different models"
            )

    @property
    def named(self) -> dict[str, ExpertMatrix]:
        """The matrices by their roles, in order."""
        every = dict(zip(ROLES, (self.gate, self.up, self.down), strict=True))
        return {role: matrix for role, matrix in every.items() if matrix is not None}

    @property
    def matrices(self) -> tuple[ExpertMatrix, ...]:
        return tuple(matrix for matrix in (self.gate, self.up, self.down) if matrix is not None)

    @property
    def tensors(self) -> dict[str, ExpertMatrix]:
        """All that an expert consists of, by name, in the order in which a slot holds it."""
        named = self.named
        return named | {bias_of(role): bias for role, bias in zip(named, self.biases, strict=False)}

    def parts(self, index: int) -> ExpertParts:
        """Return one expert's bytes in GGUF order, uint8 views `[num_bytes]`, as `tensors` names them."""
        return tuple(map(itemgetter(index), self._data))  # without a call of ours

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert in the file."""
        return sum(matrix.num_bytes for matrix in (*self.matrices, *self.biases))
