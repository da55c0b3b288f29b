"""Draws a generated model's weights and writes them, under two names each: the file's and the stock model's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGUFWriter
from gguf.quants import dequantize, quantize

from tests.support.generated_metadata import Shape
from tests.support.random_blocks import Type, random_blocks

__all__ = ["Builder", "GeneratedModel", "as_it_is"]


@dataclass(slots=True)
class GeneratedModel:
    """A written file, and the same weights for the stock model: `state` by Hugging Face name, float32."""

    path: Path
    shape: Shape
    state: dict[str, torch.Tensor] = field(default_factory=dict)


def as_it_is(value: np.ndarray) -> np.ndarray:
    return value


def _quantized(random: np.random.Generator, value: np.ndarray, kind: Type) -> np.ndarray:
    """The matrix itself in a type that gguf-py can make, another of its size in one that it cannot."""
    try:
        return quantize(value, kind)
    except NotImplementedError:
        columns = value.shape[-1]
        return random_blocks(random, kind, value.size // columns, columns).reshape(*value.shape[:-1], -1)


class Builder:
    def __init__(self, shape: Shape, path: Path, keep_state: bool) -> None:
        self.shape, self.random = shape, np.random.default_rng(shape.seed)
        self.writer = GGUFWriter(str(path), shape.architecture, use_temp_file=not keep_state)
        self.model = GeneratedModel(path, shape)
        self.keep_state = keep_state

    def dense(
        self,
        hf_name: str,
        gguf_name: str,
        *size: int,
        scale: float | None = None,
        centre: float = 0.0,
        stored: Callable[[np.ndarray], np.ndarray] = as_it_is,
    ) -> np.ndarray:
        """Draw a matrix, round it to the dense type, and write it (norms and routers stay F32).

        `stored` rearranges rows or drops dimensions on the way into the file, as a family's converter does.
        """
        scale = scale if scale is not None else size[-1] ** -0.5
        value = (centre + scale * self.random.standard_normal(size)).astype(np.float32)
        kind = self.shape.dense_type if value.ndim == 2 and "ffn_gate_inp" not in gguf_name else Type.F32
        if kind != Type.F32 and size[-1] % GGML_QUANT_SIZES[kind][0] == 0:
            raw = _quantized(self.random, value, kind)
            value = dequantize(raw, kind)
            self.writer.add_tensor(gguf_name, stored(raw), raw_dtype=kind)
        else:
            self.writer.add_tensor(gguf_name, np.ascontiguousarray(stored(value)))
        self.remember(hf_name, value)
        return value

    def draw(self, *size: int, scale: float | None = None) -> np.ndarray:
        """Draw a float32 matrix that is neither written nor remembered yet."""
        scale = scale if scale is not None else size[-1] ** -0.5
        return (scale * self.random.standard_normal(size)).astype(np.float32)

    def write(self, gguf_name: str, value: np.ndarray) -> None:
        """Write a float32 tensor as it is."""
        self.writer.add_tensor(gguf_name, np.ascontiguousarray(value))

    def write_heads(self, gguf_name: str, value: np.ndarray) -> np.ndarray:
        """Write a matrix for each head, in the dense type where blocks fit; return what then stands there."""
        kind = self.shape.dense_type
        if kind == Type.F32 or value.shape[-1] % GGML_QUANT_SIZES[kind][0]:
            self.write(gguf_name, value)
            return value
        raw = _quantized(self.random, np.ascontiguousarray(value), kind)
        self.writer.add_tensor(gguf_name, raw, raw_dtype=kind)
        stored: np.ndarray = dequantize(raw, kind)
        return stored

    def norm(self, hf_name: str, gguf_name: str, size: int) -> None:
        self.dense(hf_name, gguf_name, size, scale=0.1, centre=1.0)

    def remember(self, hf_name: str, value: np.ndarray) -> None:
        if self.keep_state and hf_name:
            self.model.state[hf_name] = torch.from_numpy(value)

    def experts(self, layer: int) -> None:
        shape = self.shape
        sizes = {
            "gate": (shape.inter, shape.hidden),
            "up": (shape.inter, shape.hidden),
            "down": (shape.hidden, shape.inter),
        }
        values = {}
        for (role, (rows, columns)), kind in zip(sizes.items(), shape.types, strict=True):
            raw = random_blocks(self.random, kind, shape.experts * rows, columns)
            self._write_experts(f"blk.{layer}.ffn_{role}", raw.reshape(shape.experts, rows, -1), kind)
            if self.keep_state:
                values[role] = dequantize(raw, kind).reshape(shape.experts, rows, columns)
        if self.keep_state:
            block = "block_sparse_moe" if shape.architecture == "granitemoe" else "mlp"
            prefix = f"model.layers.{layer}.{block}.experts"
            self.remember(f"{prefix}.gate_up_proj", np.concatenate((values["gate"], values["up"]), axis=1))
            self.remember(f"{prefix}.down_proj", values["down"])

    def _write_experts(self, name: str, raw: np.ndarray, kind: Type) -> None:
        if not self.shape.expert_tensors:
            self.writer.add_tensor(f"{name}_exps.weight", raw, raw_dtype=kind)
            return
        for index, matrix in enumerate(raw):
            self.writer.add_tensor(f"{name}.{index}.weight", matrix, raw_dtype=kind)

    def finish(self) -> GeneratedModel:
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()
        return self.model
