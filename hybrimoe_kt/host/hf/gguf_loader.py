"""What operators are given as `gguf_loader`: the file's experts, and the state all operators of a model share."""

from __future__ import annotations

from typing import Any

import torch

from hybrimoe_kt.device.host_store import ExpertMatrix, LayerExperts
from hybrimoe_kt.errors import ModelError
from hybrimoe_kt.operators.runtime import Runtime

from .gguf_file import GgufFile, GgufTensor

__all__ = ["GgufLoader"]


class GgufLoader:
    """Hands out expert weights as views of the mapped file; owns the mapping for as long as the model lives."""

    def __init__(self, file: GgufFile, option_overrides: dict[str, Any] | None = None) -> None:
        self.file = file
        self.option_overrides = option_overrides or {}
        """Expert options that win over a rule's kwargs."""
        self.runtime: Runtime | None = None
        """Made by the first HybriMoEExperts, shared by all."""
        self.tensor_device_map: dict[str, dict[str, Any]] = {}
        """Module path -> kwargs of the rule that decided it."""

    def layer_experts(self, layer: int, *, num_experts: int, top_k: int, hidden: int, inter: int) -> LayerExperts:
        """Return one layer's routed experts in place; ModelError when the file lacks or contradicts them."""
        tensors = {role: self._stacked(layer, role) for role in ("gate", "up", "down")}
        shapes = {"gate": (num_experts, inter, hidden), "up": (num_experts, inter, hidden)}
        shapes["down"] = (num_experts, hidden, inter)
        for role, tensor in tensors.items():
            if tensor.shape != shapes[role]:
                raise ModelError(
                    f"{self.file.path}: tensor {tensor.name} has shape {list(tensor.shape)}, the configuration wants "
                    f"{list(shapes[role])}; the GGUF file and the configuration belong to different models"
                )
        matrices = {role: _matrix(tensor) for role, tensor in tensors.items()}
        return LayerExperts(layer, num_experts, top_k, hidden, inter, **matrices)

    def _stacked(self, layer: int, role: str) -> GgufTensor:
        return self.file.tensor(f"blk.{layer}.ffn_{role}_exps.weight")


def _matrix(tensor: GgufTensor) -> ExpertMatrix:
    num_experts, rows, columns = tensor.shape
    return ExpertMatrix(torch.from_numpy(tensor.data).view(num_experts, -1), tensor.ggml_type, rows, columns)
