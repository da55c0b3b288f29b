"""A layer of random experts, steps through it, and the calls that a backend has to refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from hybrimoe_kt.backends.dequantize import dequantize
from hybrimoe_kt.backends.torch_reference import TorchReferenceCpu
from hybrimoe_kt.device.backend import CpuBackend, Routed
from hybrimoe_kt.device.experts import ExpertMatrix, LayerExperts
from tests.support.random_blocks import Type, random_blocks

__all__ = ["BAD_CALLS", "EXPERTS", "HIDDEN", "MAX_TOKENS", "TOP_K", "answers", "floats", "layer", "reference", "step"]

EXPERTS, TOP_K, HIDDEN, MAX_TOKENS = 8, 3, 256, 32

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def layer(
    kind: Type = Type.Q8_0,
    inter: int = 256,
    hidden: int = HIDDEN,
    number: int = 0,
    down: Type | None = None,
    up: Type | None = None,
) -> LayerExperts:
    """Experts of `kind`, but for up and down where those are named; `number` is the layer's and the seed."""
    random = np.random.default_rng(number)

    def matrix(kind: Type, rows: int, columns: int) -> ExpertMatrix:
        raw = random_blocks(random, kind, EXPERTS * rows, columns).reshape(EXPERTS, -1)
        return ExpertMatrix(torch.from_numpy(np.ascontiguousarray(raw)), int(kind), rows, columns)

    up, down = kind if up is None else up, kind if down is None else down  # F32 is 0
    shapes = (kind, inter, hidden), (up, inter, hidden), (down, hidden, inter)
    return LayerExperts(number, EXPERTS, TOP_K, hidden, inter, *(matrix(*shape) for shape in shapes))


def floats(experts: LayerExperts) -> LayerExperts:
    """The same experts dequantised, each value as it is."""
    made = []
    for matrix in experts.matrices:
        values = dequantize(matrix.data.flatten(), matrix.ggml_type, (experts.num_experts, matrix.rows, matrix.columns))
        raw = values.contiguous().view(torch.uint8).view(experts.num_experts, -1)
        made.append(ExpertMatrix(raw, int(Type.F32), matrix.rows, matrix.columns))
    return LayerExperts(experts.layer, experts.num_experts, experts.top_k, experts.hidden, experts.inter, *made)


def step(num_tokens: int, skipped: float = 0.3, seed: int = 0, hidden: int = HIDDEN) -> Inputs:
    """Hidden states, ids of which some are -1, and weights."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(num_tokens, hidden, generator=generator)
    ids = torch.rand(num_tokens, EXPERTS, generator=generator).argsort(dim=1)[:, :TOP_K]
    ids[torch.rand(ids.shape, generator=generator) < skipped] = -1
    return states, ids, torch.rand(num_tokens, TOP_K, generator=generator)


def answers(backend: CpuBackend, experts: LayerExperts, *inputs: torch.Tensor) -> torch.Tensor:
    """What a backend that has the layer makes of one step."""
    backend.submit(experts.layer, Routed(*inputs))
    return backend.wait().clone()


def reference(experts: LayerExperts, *inputs: torch.Tensor) -> torch.Tensor:
    """`[num_tokens, hidden]` by plain torch on dequantised weights."""
    backend = TorchReferenceCpu()
    backend.add_layer(experts)
    return answers(backend, experts, *inputs).sum(dim=1)


def _change(**changes: Any) -> Inputs:
    hidden, ids, weights = step(2, skipped=0)
    return changes.get("hidden", hidden), changes.get("ids", ids), changes.get("weights", weights)


_HIDDEN, _IDS, _WEIGHTS = step(2, skipped=0)
BAD_CALLS: dict[str, tuple[Inputs, str]] = {
    "NaN": (_change(hidden=torch.full((2, HIDDEN), float("nan"))), "not finite"),
    "infinity": (_change(hidden=torch.full((2, HIDDEN), float("inf"))), "not finite"),
    "NaN weight": (_change(weights=torch.full((2, TOP_K), float("nan"))), "not finite"),
    "int16 ids": (_change(ids=_IDS.short()), "ids are torch.int16 .* wanted int64"),
    "bf16 weights": (_change(weights=_WEIGHTS.bfloat16()), "weights torch.bfloat16; wanted int64"),
    "bf16 hidden": (_change(hidden=_HIDDEN.bfloat16()), "wanted float32"),
    "wrong width": (_change(hidden=torch.zeros(2, HIDDEN + 256)), "wanted float32"),
    "too many tokens": (step(MAX_TOKENS + 1), "33 tokens in one call"),
    "no tokens": (step(0), "0 tokens"),
    "top_k too large": (_change(ids=torch.arange(8).expand(2, 8), weights=torch.ones(2, 8)), "at most 3"),
    "expert out of range": (_change(ids=torch.tensor([[0, 1, 8], [0, 1, 2]])), "expert 8 routed in layer 0"),
    "negative id": (_change(ids=torch.tensor([[0, 1, -5], [0, 1, 2]])), "expert -5 routed in layer 0"),
    "duplicate": (_change(ids=torch.tensor([[0, 1, 2], [4, 5, 4]])), "names the same expert twice"),
    "fewer ids than tokens": (_change(ids=_IDS[:1], weights=_WEIGHTS[:1]), "routing is"),
}  # fmt: skip
"""Steps for `layer()` in a backend of `MAX_TOKENS`, and what the refusal says."""
