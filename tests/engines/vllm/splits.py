"""A compile backend that cuts a graph as vLLM does for graphs captured in pieces, and runs the pieces one by one."""

from __future__ import annotations

from typing import Any

import torch
from vllm.compilation.backends import split_graph
from vllm.config import CompilationConfig

from hybrimoe_kt.host.vllm.names import SPLITTING_OP

__all__ = ["PIECES", "backend"]

PIECES: list[torch.fx.GraphModule] = []
"""The eager pieces of the graph compiled last, and what they are called in it: filled by `backend`."""
WHOLE: list[torch.fx.GraphModule] = []


def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
    """`--compilation-config '{"mode": 2, "backend": "tests.engines.vllm.splits.backend"}'`."""
    whole, items = split_graph(graph, [*CompilationConfig._attention_ops, SPLITTING_OP])
    PIECES[:] = [item.graph for item in items if item.is_splitting_graph]
    WHOLE[:] = [whole]
    return whole
