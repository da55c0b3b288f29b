"""Dense weights: each parameter of the model found in the GGUF file, checked, and dequantised when asked for.

Dequantised where it is to stand: what crosses a link are the file's bytes, and no float is made on the way.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from gguf.tensor_mapping import TensorNameMap

from hybrimoe_kt.backends.dequantize import dequantize
from hybrimoe_kt.errors import ModelError
from hybrimoe_kt.quants import TYPES

from .architectures import Architecture
from .gguf_file import GgufFile, GgufTensor

__all__ = ["LazyTensor", "Load", "Where", "dense_state_dict"]

Where = Callable[[str], torch.device]
"""Parameter -> the device it will stand on."""
Load = Callable[[torch.dtype, torch.device], torch.Tensor]
"""Makes a parameter in a type, on a device."""
_T = TypeVar("_T")
_LAYER = re.compile(r"\.layers\.(\d+)\.")
_PIECE_VALUES = 2**22
"""Dequantised at a time: some 20 bytes a value of intermediates, in each of the loader's four threads. On one core 67
million values of Q4_K or Q6_K took 0.34 s so, 0.7 s in pieces of 2**24, 1.2 to 2.1 s in one."""


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
        return {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[self.dtype]

    def get_shape(self) -> list[int]:
        return list(self.shape)


def dense_state_dict(
    file: GgufFile,
    architecture: Architecture,
    parameters: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    where: Where,
) -> dict[str, LazyTensor]:
    """Return a lazy state dict for `parameters` (name -> shape, routed experts left out).

    A parameter without a tensor, or whose tensor's shape contradicts the configuration, is a ModelError
    that names both; nothing is dequantised here.
    """
    num_blocks = 1 + max((int(match[1]) for name in parameters if (match := _LAYER.search(name))), default=0)
    names = architecture.name_map(num_blocks)
    state: dict[str, LazyTensor] = {}
    for name, shape in parameters.items():
        gguf_name = _gguf_name(architecture, names, name)
        kept = torch.float32 if name.endswith(architecture.float32) else dtype
        if gguf_name in file.tensors:
            load = _single(file, architecture, file.tensors[gguf_name], name, shape)
        else:
            load = _composed(file, architecture, name, gguf_name, shape)
        state[name] = LazyTensor(shape, kept, where(name), load)
    return state


def _gguf_name(architecture: Architecture, names: TensorNameMap, name: str) -> str | None:
    """Return what the family calls a parameter in a file, None where the parameter has no name there."""
    own, layer = _recipe(architecture.names, name), _LAYER.search(name)
    if own is not None and layer is not None:
        return own.format(layer=layer[1])
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    suffix = name.rpartition(".")[2]
    return found if found is None or found.endswith(suffix) else f"{found}.{suffix}"


def _single(file: GgufFile, architecture: Architecture, tensor: GgufTensor, name: str, shape: tuple[int, ...]) -> Load:
    transform, key = _recipe(architecture.transforms, name), architecture.key(file)
    _check_shape(file, tensor.name, transform.shape(tensor.shape) if transform else tensor.shape, name, shape)
    if transform is None:
        return lambda dtype, device: _values(tensor, dtype, device)
    return lambda dtype, device: transform.build(_values(tensor, torch.float32, device), key).to(dtype)


def _composed(
    file: GgufFile, architecture: Architecture, name: str, gguf_name: str | None, shape: tuple[int, ...]
) -> Load:
    layer = _LAYER.search(name)
    recipe = _recipe(architecture.composed, name)
    if recipe is None or layer is None:
        raise ModelError(f"{file.path}: no tensor for {name} (expected {gguf_name or 'a name this family lacks'})")
    parts = [file.tensor(part.format(layer=layer[1])) for part in recipe.parts]
    _check_shape(file, " + ".join(part.name for part in parts), recipe.shape(*(p.shape for p in parts)), name, shape)
    key = architecture.key(file)
    return lambda dtype, device: recipe.build(*(_values(part, torch.float32, device) for part in parts), key).to(dtype)


def _recipe(recipes: Mapping[str, _T], name: str) -> _T | None:
    """Return the entry whose key ends the parameter's name, at a dot."""
    return next((recipe for suffix, recipe in recipes.items() if f".{name}".endswith(f".{suffix}")), None)


def _values(tensor: GgufTensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
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


def _check_shape(file: GgufFile, gguf_name: str, found: tuple[int, ...], name: str, wanted: tuple[int, ...]) -> None:
    if tuple(found) != tuple(wanted):
        raise ModelError(
            f"{file.path}: tensor {gguf_name} has shape {list(found)}, the configuration wants {list(wanted)} for "
            f"{name}; the GGUF file and the configuration belong to different models"
        )
