"""Layers of random experts in slots, for kernels: every type, slots poisoned where nothing was laid out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf.quants import dequantize

from hybrimoe_kt.backends.torch_reference import expert_ffn
from hybrimoe_kt.device.experts import ExpertMatrix, LayerExperts
from hybrimoe_kt.device.layout import SlotLayout
from hybrimoe_kt.quants import TYPES, kernel_types
from tests.support.random_blocks import Type, random_blocks

KINDS = tuple(Type(row.number) for row in kernel_types())
BLOCKS_OF_32 = tuple(Type(row.number) for row in kernel_types() if row.block_values == 32)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def sizes_of(gate: Type, up: Type, down: Type) -> tuple[int, int]:
    """Return the oddest legal (hidden, inter): no multiples of 256 where the types allow it."""
    hidden = {8: 264, 32: 352, 256: 256}[max(TYPES[gate].column_step, TYPES[up].column_step)]
    return hidden, {8: 72, 32: 96, 256: 256}[TYPES[down].column_step]


@dataclass
class SlottedLayer:
    """`slot_of` int32 `[num_experts]`; `memory` uint8 `[num_slots, slot_bytes]`."""

    experts: LayerExperts
    layout: SlotLayout
    memory: torch.Tensor
    slot_of: torch.Tensor

    @property
    def slots(self) -> list[tuple[int, int]]:
        return [(expert, slot) for expert, slot in enumerate(self.slot_of.tolist()) if slot >= 0]

    def matrices(self, expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gate, up `[inter, hidden]` and down `[hidden, inter]` in float32, dequantised by gguf-py."""
        gate, up, down = (
            torch.from_numpy(np.array(dequantize(m.data[expert].numpy(), Type(m.ggml_type)), dtype=np.float32)).view(
                m.rows, m.columns
            )
            for m in self.experts.matrices
        )
        return gate, up, down

    def answer(
        self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: Sequence[int] | None = None
    ) -> torch.Tensor:
        """What a launch must add: float32 `[T, hidden]` over experts in slots, or over `experts`."""
        out = torch.zeros(hidden.shape[0], self.experts.hidden)
        for expert, _ in self.slots if experts is None else [(expert, 0) for expert in experts]:
            token, place = torch.where(ids.cpu() == expert)
            if token.numel():
                answers = expert_ffn(hidden.cpu()[token].float(), *self.matrices(expert))
                out.index_add_(0, token, answers * weights.cpu()[token, place, None])
        return out


def slotted_layer(
    gate: Type,
    up: Type | None = None,
    down: Type | None = None,
    *,
    num_experts: int = 5,
    top_k: int = 2,
    number: int = 0,
) -> SlottedLayer:
    """Make a layer whose experts but one, the second, are in slots, in reverse order."""
    up, down = up or gate, down or gate
    hidden, inter = sizes_of(gate, up, down)
    random = np.random.default_rng([int(gate), int(up), int(down), number])

    def matrix(kind: Type, rows: int, columns: int) -> ExpertMatrix:
        raw = random_blocks(random, kind, num_experts * rows, columns).reshape(num_experts, -1)
        return ExpertMatrix(torch.from_numpy(np.ascontiguousarray(raw)), int(kind), rows, columns)

    matrices = matrix(gate, inter, hidden), matrix(up, inter, hidden), matrix(down, hidden, inter)
    experts = LayerExperts(number, num_experts, top_k, hidden, inter, *matrices)
    layout = SlotLayout(experts)
    slot_of = torch.tensor([num_experts - 1 - e if e != 1 else -1 for e in range(num_experts)], dtype=torch.int32)
    memory = torch.full((num_experts, layout.slot_bytes), 0xFF, dtype=torch.uint8)
    for expert, slot in enumerate(slot_of.tolist()):
        if slot >= 0:
            layout.write(experts.parts(expert), memory[slot])
    return SlottedLayer(experts, layout, memory.to(DEVICE), slot_of.to(DEVICE))


def routed(
    layer: SlottedLayer, num_tokens: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return hidden `[T, hidden]`, ids `[T, K]` (one pair is -1) and weights `[T, K]`."""
    generator = torch.Generator().manual_seed(seed)
    experts = layer.experts
    hidden = torch.randn(num_tokens, experts.hidden, generator=generator).to(dtype)
    order = torch.rand(num_tokens, experts.num_experts, generator=generator).argsort(dim=1)
    ids = order[:, : experts.top_k].contiguous()
    ids[num_tokens // 2, 0] = -1
    weights = torch.rand(num_tokens, experts.top_k, generator=generator)
    return hidden.to(DEVICE), ids.to(DEVICE), weights.to(DEVICE)


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference over the norm; NaN and infinity are errors of their own."""
    found, wanted = found.float().cpu(), wanted.float().cpu()
    assert found.isfinite().all(), "NaN or infinity in the result"
    return float((found - wanted).norm() / wanted.norm())


def experts_of(model: Path, layer: int) -> LayerExperts:
    """Return one layer's experts of a GGUF file, views of the mapping."""
    from hybrimoe_kt.weights.gguf_file import GgufFile

    file = GgufFile(model)
    matrices = []
    for role in ("gate", "up", "down"):
        tensor = file.tensor(f"blk.{layer}.ffn_{role}_exps.weight")
        num_experts, rows, columns = tensor.shape
        data = tensor.values().view(num_experts, -1)
        matrices.append(ExpertMatrix(data, tensor.ggml_type, rows, columns))
    gate, up, down = matrices
    top_k = int(file.metadata[f"{file.architecture}.expert_used_count"])
    return LayerExperts(layer, num_experts, top_k, gate.columns, gate.rows, gate, up, down)
