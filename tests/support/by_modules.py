"""Has a model computed by Transformers' own modules, which tests can hook into; keys and values stay the graphs'."""

from __future__ import annotations

from hybrimoe_kt.engine.token_generator import TokenGenerator
from hybrimoe_kt.operators.layer_ggml import GgmlLayer

__all__ = ["by_modules"]


def by_modules(engine: TokenGenerator) -> None:
    """Let no step be a graph's from now on."""
    engine.loop = None
    for module in engine.model.modules():
        if isinstance(module, GgmlLayer):
            module.most_tokens = 0
