"""What a layer's kernels are given: matrices in slots, and memory in one allocation that every layer and step uses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from hybrimoe_kt.quants import QuantType

from .configs import max_blocks

__all__ = [
    "CHUNK_TOKENS",
    "DECODE_TOKENS",
    "LayerShape",
    "MatrixInSlot",
    "Parts",
    "Workspace",
    "decode_parts",
    "prefill_parts",
    "quantized_parts",
]

DECODE_TOKENS = 8
"""Up to so many tokens the matrix-vector kernels run: they read an expert once for each token that uses it."""
CHUNK_TOKENS = 1024
"""Longer prompts pass in pieces of this many tokens, which bounds the answers waiting to be added up."""

Parts = Mapping[str, tuple[Sequence[int], torch.dtype]]


class MatrixInSlot(Protocol):
    """Where one of gate `[inter, H]`, up `[inter, H]`, down `[H, inter]` lies in every slot; a `MatrixLayout` does.

    Also where a linear layer's matrix lies in its memory.
    """

    @property
    def type(self) -> QuantType: ...
    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...
    @property
    def offsets(self) -> tuple[int, int, int, int]:
        """The planes' first bytes in the slot, filled up to four with zeros."""
        ...


@dataclass(frozen=True, slots=True)
class LayerShape:
    num_experts: int
    top_k: int
    hidden: int
    inter: int


def decode_parts(shape: LayerShape, num_tokens: int) -> Parts:
    """What a decode step writes between its kernels: shape and dtype by name; int8 activations are words of four."""
    num_pairs = num_tokens * shape.top_k
    return {
        **quantized_parts(num_tokens, shape.hidden),
        "act": ((num_pairs, shape.inter), torch.float32),
        "aq": ((num_pairs, shape.inter // 4), torch.int32),
        "as": ((num_pairs, shape.inter // 32), torch.float32),
        "am": ((num_pairs, shape.inter // 32), torch.float32),
        "pair_slot": ((num_pairs,), torch.int32),
    }


def quantized_parts(num_rows: int, columns: int) -> Parts:
    """The int8 form of rows of activations."""
    return {
        "xq": ((num_rows, columns // 4), torch.int32),
        "xs": ((num_rows, columns // 32), torch.float32),
        "xm": ((num_rows, columns // 32), torch.float32),
    }


def prefill_parts(shape: LayerShape, num_tokens: int, block_pairs: int, dtype: torch.dtype) -> Parts:
    """What a prefill step writes between its kernels; `dtype` is what the tensor cores multiply."""
    num_pairs = num_tokens * shape.top_k
    num_blocks = max_blocks(num_pairs, shape.num_experts, block_pairs)
    return {
        "x": ((num_tokens, shape.hidden), dtype),
        "pairs": ((num_blocks * block_pairs,), torch.int32),
        "slots": ((num_blocks,), torch.int32),
        "act": ((num_pairs, shape.inter), dtype),
        "answers": ((num_pairs, shape.hidden), torch.float32),
    }


class Workspace:
    """One allocation on `device`, carved anew for every call; calls on one stream may share it."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.memory = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self._decode: dict[tuple[LayerShape, int], dict[str, torch.Tensor]] = {}
        self._quantized: dict[tuple[int, int], dict[str, torch.Tensor]] = {}

    def decode(self, shape: LayerShape, num_tokens: int) -> dict[str, torch.Tensor]:
        """Carve a decode step's parts, once for each shape and number of tokens: views cost microseconds."""
        key = shape, num_tokens
        if key not in self._decode:
            self._decode[key] = self.carve(decode_parts(shape, num_tokens))
        return self._decode[key]

    def quantized(self, num_rows: int, columns: int) -> dict[str, torch.Tensor]:
        """Carve the int8 form of rows, once for each shape."""
        key = num_rows, columns
        if key not in self._quantized:
            self._quantized[key] = self.carve(quantized_parts(*key))
        return self._quantized[key]

    @staticmethod
    def bytes_for(parts: Parts) -> int:
        return sum(_part_bytes(shape, dtype) for shape, dtype in parts.values())

    def carve(self, parts: Parts) -> dict[str, torch.Tensor]:
        """Return views of the named shapes, one after the other; their contents are whatever was there."""
        views, at = {}, 0
        for name, (shape, dtype) in parts.items():
            num_bytes = math.prod(shape) * dtype.itemsize
            views[name] = self.memory[at : at + num_bytes].view(dtype).view(*shape)
            at += _part_bytes(shape, dtype)
        return views


def _part_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    return -(-math.prod(shape) * dtype.itemsize // 128) * 128
