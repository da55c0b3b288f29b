"""Which part of every MoE layer one rank of an engine computes: some experts whole, or a part of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hybrimoe_kt.device.experts import ExpertMatrix, LayerExperts
from hybrimoe_kt.errors import ConfigError
from hybrimoe_kt.quants import TYPES, row_bytes

__all__ = ["RankShare"]


@dataclass(frozen=True, slots=True)
class RankShare:
    """All of a layer unless said otherwise."""

    experts: Sequence[int] | None = None
    """Expert parallel: the layer's numbers of the experts that are this rank's, in its own order."""
    part: int = 0
    num_parts: int = 1
    """Tensor parallel: part `part` of `num_parts` of what lies between an expert's matrices."""
    whole_experts_by: str = "expert parallelism"
    """The engine's flag for whole experts, for errors."""

    def of(self, whole: LayerExperts) -> LayerExperts:
        """This rank's part of a layer: whole experts are views where they stand together, parts are copies.

        ConfigError where blocks of a quantised type would have to be cut.
        """
        kept = whole if self.experts is None else self._chosen(whole, self.experts)
        return kept if self.num_parts == 1 else self._cut(kept)

    def _chosen(self, whole: LayerExperts, experts: Sequence[int]) -> LayerExperts:
        first, count = experts[0], len(experts)
        are_together = list(experts) == list(range(first, first + count))

        def chosen(matrix: ExpertMatrix) -> ExpertMatrix:
            data = matrix.data[first : first + count] if are_together else matrix.data[list(experts)]
            return ExpertMatrix(data, matrix.ggml_type, matrix.rows, matrix.columns)

        gate = None if whole.gate is None else chosen(whole.gate)
        return LayerExperts(
            whole.layer, count, whole.top_k, whole.hidden, whole.inter,
            gate, chosen(whole.up), chosen(whole.down), whole.form, tuple(map(chosen, whole.biases)),
        )  # fmt: skip

    def _cut(self, whole: LayerExperts) -> LayerExperts:
        inter, rest = divmod(whole.inter, self.num_parts)
        if rest:
            raise ConfigError(
                f"layer {whole.layer}: experts of width {whole.inter} cannot be cut into {self.num_parts} parts; give "
                f"{self.whole_experts_by}"
            )
        down = whole.down
        block = TYPES[down.ggml_type].block_values
        if inter % block:
            raise ConfigError(
                f"layer {whole.layer}: down experts are {down.type_name}, whose blocks of {block} values cannot be cut "
                f"into {self.num_parts} parts of {inter}; give {self.whole_experts_by}, which keeps experts whole"
            )
        begin = self.part * inter
        gate = None if whole.gate is None else _rows(whole.gate, begin, inter)
        biases = dict(zip(whole.named, whole.biases, strict=False))
        cut_biases = tuple(
            _only(bias, is_kept=self.part == 0) if role == "down" else _columns(bias, begin, inter)
            for role, bias in biases.items()
        )
        return LayerExperts(
            whole.layer, whole.num_experts, whole.top_k, whole.hidden, inter,
            gate, _rows(whole.up, begin, inter), _columns(down, begin, inter), whole.form, cut_biases,
        )  # fmt: skip


def _rows(matrix: ExpertMatrix, begin: int, count: int) -> ExpertMatrix:
    size = row_bytes(matrix.ggml_type, matrix.columns)
    data = matrix.data[:, begin * size : (begin + count) * size].contiguous()
    return ExpertMatrix(data, matrix.ggml_type, count, matrix.columns)


def _columns(matrix: ExpertMatrix, begin: int, count: int) -> ExpertMatrix:
    """Whole blocks of every row."""
    before, size = row_bytes(matrix.ggml_type, begin), row_bytes(matrix.ggml_type, count)
    rows = matrix.data.unflatten(1, (matrix.rows, -1))[:, :, before : before + size]
    return ExpertMatrix(rows.flatten(1).contiguous(), matrix.ggml_type, matrix.rows, count)


def _only(bias: ExpertMatrix, *, is_kept: bool) -> ExpertMatrix:
    """What is added to the sum of all parts, by one of them."""
    return bias if is_kept else ExpertMatrix(torch.zeros_like(bias.data), bias.ggml_type, bias.rows, bias.columns)
