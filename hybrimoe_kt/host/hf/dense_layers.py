"""Gives a loaded model's layers their dense pieces: graphs of ggml's where they can be made, else Transformers' own."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from torch import nn

from hybrimoe_kt.backends.ggml.dense_layer import DenseLayer, DenseMemory
from hybrimoe_kt.backends.ggml.head_graph import HeadGraph
from hybrimoe_kt.operators.layer_ggml import GgmlLayer

from .architectures import Architecture
from .layer_parts import NotDescribed, head_parts, layer_parts

__all__ = ["DenseModel", "attach_dense_layers"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class DenseModel:
    """A model all of whose layers have dense pieces, and what stands before and behind them."""

    layers: tuple[GgmlLayer, ...]
    memory: DenseMemory
    embedding: nn.Module
    embedding_factor: float
    head: HeadGraph
    most_tokens: int
    """Of one step."""


def attach_dense_layers(model: nn.Module, family: Architecture) -> DenseModel | None:
    """Attach what each `GgmlLayer` computes by; say why one stays as it is. None where any layer does."""
    causal: Any = model
    reasons: dict[str, list[int]] = {}
    layers = [layer for layer in causal.model.layers if isinstance(layer, GgmlLayer) and layer.may_be_ggml]
    if not layers:
        return None  # nor is there a library, perhaps
    memory = DenseMemory(int(causal.config.hidden_size))
    for layer in layers:
        try:
            read = layer_parts(layer.stock, causal.config, getattr(causal.model, "rotary_emb", None), family)
        except NotDescribed as refused:
            reasons.setdefault(str(refused), []).append(layer.layer)
            continue
        layer.attach(DenseLayer(read.parts, memory), read.layout, read.experts, read.router)
    for reason, numbers in reasons.items():
        logger.info("layers %s are computed by Transformers' own modules: %s", _ranges(numbers), reason)
    if len(layers) < len(causal.model.layers) or any(layer.dense is None for layer in layers):
        return None
    try:
        head = HeadGraph(memory.pool, head_parts(model, family), int(causal.config.hidden_size))
    except NotDescribed as refused:
        logger.info("the head is computed by Transformers' own module: %s", refused)
        return None
    factor = float(getattr(causal.config, "embedding_multiplier", 1.0) or 1.0)
    most = min(layer.most_tokens for layer in layers)
    return DenseModel(tuple(layers), memory, causal.model.embed_tokens, factor, head, most)


def _ranges(numbers: list[int]) -> str:
    """0, 1, 2, 5 -> "0 to 2, 5"."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]} to {part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)
