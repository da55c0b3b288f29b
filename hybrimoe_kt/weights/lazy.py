"""Dense tensors that are read when they are wanted, on the device where they are to stand.

What crosses a link are the file's bytes, and no float is made on the way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from hybrimoe_kt.backends.dequantize import dequantize
from hybrimoe_kt.quants import TYPES

from .gguf_file import GgufTensor

__all__ = ["LazyTensor", "Load", "Where", "values_of"]

Where = Callable[[str], torch.device]
"""Parameter -> the device it will stand on."""
Load = Callable[[torch.dtype, torch.device], torch.Tensor]
"""Makes a parameter in a type, on a device."""
_PIECE_VALUES = 2**22
"""Dequantised at a time: some 20 bytes a value of intermediates, in each of the loader's four threads. On one core 67
million values of Q4_K or Q6_K took 0.34 s so, 0.7 s in pieces of 2**24, 1.2 to 2.1 s in one."""


_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}


class LazyTensor:
    """One parameter, made when Transformers' loader indexes it; the loader needs no more than this."""

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        load: Load,
    ) -> None:
        self.shape, self.dtype, self.device, self._load = shape, dtype, device, load

    def __getitem__(self, _: Any) -> torch.Tensor:
        return self._load(self.dtype, self.device)

    def get_dtype(self) -> str:
        """The name the loader expects of a checkpoint slice."""
        return _NAMES[self.dtype]

    def get_shape(self) -> list[int]:
        return list(self.shape)


def values_of(tensor: GgufTensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Dequantise on `device`, large tensors piece by piece: the float32 values beside the result stay few."""
    data, num_values = tensor.values(), math.prod(tensor.shape)
    if num_values <= _PIECE_VALUES:
        return dequantize(data.to(device, copy=True), tensor.ggml_type, tensor.shape).to(dtype)
    kind = TYPES[tensor.ggml_type]
    num_blocks = _PIECE_VALUES // kind.block_values
    pieces = data.split(num_blocks * kind.block_bytes)
    out = torch.empty(num_values, dtype=dtype, device=device)
    for part, piece in zip(out.split(num_blocks * kind.block_values), pieces, strict=True):
        part.copy_(dequantize(piece.to(device, copy=True), tensor.ggml_type, tuple(part.shape)))
    return out.view(tensor.shape)
