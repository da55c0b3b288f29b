"""Routed experts out of the legacy framework's GGUF loader, as views of the files that it has mapped."""

from __future__ import annotations

import re
import warnings
from typing import Any

import numpy as np
import torch

from hybrimoe_kt.device.experts import ROLES, ExpertMatrix, LayerExperts
from hybrimoe_kt.errors import ConfigError, ModelError

__all__ = ["layer_experts", "layer_number"]

_LAYER = re.compile(r"(?:^|\.)(?:blk|layers)\.(\d+)(?:\.|$)")


def layer_number(key: str) -> int:
    """The layer of an operator's key: `blk.N` up to release 0.3.0, the Hugging Face path from 0.3.1 on."""
    match = _LAYER.search(key)
    if match is None:
        raise ConfigError(f"{key}: HybriMoEExperts replaces `model.layers.N....experts`, this name has no layer number")
    return int(match[1])


def layer_experts(loader: Any, layer: int, *, num_experts: int, top_k: int) -> LayerExperts:
    """Return a layer's experts, in place where the file has them stacked; its shapes decide the dimensions."""
    gate, up, down = (_matrix(loader, layer, role, num_experts) for role in ROLES)
    return LayerExperts(layer, num_experts, top_k, gate.columns, gate.rows, gate, up, down)


def _matrix(loader: Any, layer: int, role: str, num_experts: int) -> ExpertMatrix:
    stacked = f"blk.{layer}.ffn_{role}_exps.weight"
    if stacked in loader.tensor_info:
        return _view(loader, stacked, num_experts, loader.get_mmap_tensor(stacked))
    names = [f"blk.{layer}.ffn_{role}.{index}.weight" for index in range(num_experts)]  # files before April 2024
    missing = next((name for name in names if name not in loader.tensor_info), None)
    if missing is not None:
        raise ModelError(f"{loader.gguf_path}: neither {stacked} nor {missing} is in the GGUF files of layer {layer}")
    return _view(loader, names[0], num_experts, np.concatenate([loader.get_mmap_tensor(name) for name in names]))


def _view(loader: Any, name: str, num_experts: int, data: np.ndarray) -> ExpertMatrix:
    info = loader.tensor_info[name]
    columns, rows = (int(size) for size in info["shape"][:2])  # in GGUF's order, the fastest dimension first
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mapping is read-only, and nothing here writes
        values = torch.from_numpy(np.asarray(data)).view(torch.uint8)
    if values.numel() % num_experts:
        raise ModelError(f"{loader.gguf_path}: {name} does not hold {num_experts} experts, as the configuration says")
    return ExpertMatrix(values.view(num_experts, -1), int(info["ggml_type"]), rows, columns)
