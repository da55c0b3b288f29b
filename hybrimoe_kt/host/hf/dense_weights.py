"""Dense weights: each parameter of the model found in the GGUF file, checked, and dequantised when asked for."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from gguf.tensor_mapping import TensorNameMap

from hybrimoe_kt.backends.dequantize import dequantize
from hybrimoe_kt.errors import ModelError

from .architectures import Architecture
from .gguf_file import GgufFile, GgufTensor

__all__ = ["LazyTensor", "dense_state_dict"]

_T = TypeVar("_T")
_LAYER = re.compile(r"\.layers\.(\d+)\.")


class LazyTensor:
    """One parameter, dequantised when Transformers' loader indexes it; the loader needs no more than this."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, load: Callable[[], torch.Tensor]) -> None:
        self.shape, self.dtype, self._load = shape, dtype, load

    def __getitem__(self, _: Any) -> torch.Tensor:
        return self._load().to(self.dtype)

    def get_dtype(self) -> str:
        """The name the loader expects of a checkpoint slice."""
        return {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[self.dtype]

    def get_shape(self) -> list[int]:
        return list(self.shape)


def dense_state_dict(
    file: GgufFile, architecture: Architecture, parameters: Mapping[str, tuple[int, ...]], dtype: torch.dtype
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
            state[name] = _single(file, architecture, file.tensors[gguf_name], name, shape, kept)
        else:
            state[name] = _composed(file, architecture, name, gguf_name, shape, kept)
    return state


def _gguf_name(architecture: Architecture, names: TensorNameMap, name: str) -> str | None:
    """Return what the family calls a parameter in a file, None where the parameter has no name there."""
    own, layer = _recipe(architecture.names, name), _LAYER.search(name)
    if own is not None and layer is not None:
        return own.format(layer=layer[1])
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    suffix = name.rpartition(".")[2]
    return found if found is None or found.endswith(suffix) else f"{found}.{suffix}"


def _single(
    file: GgufFile,
    architecture: Architecture,
    tensor: GgufTensor,
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> LazyTensor:
    transform, key = _recipe(architecture.transforms, name), architecture.key(file)
    found = transform.shape(tensor.shape) if transform else tensor.shape
    _check_shape(file, tensor.name, found, name, shape)
    return LazyTensor(shape, dtype, lambda: transform.build(_values(tensor), key) if transform else _values(tensor))


def _composed(
    file: GgufFile,
    architecture: Architecture,
    name: str,
    gguf_name: str | None,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> LazyTensor:
    layer = _LAYER.search(name)
    recipe = _recipe(architecture.composed, name)
    if recipe is None or layer is None:
        raise ModelError(f"{file.path}: no tensor for {name} (expected {gguf_name or 'a name this family lacks'})")
    parts = [file.tensor(part.format(layer=layer[1])) for part in recipe.parts]
    _check_shape(file, " + ".join(part.name for part in parts), recipe.shape(*(p.shape for p in parts)), name, shape)
    key = architecture.key(file)
    return LazyTensor(shape, dtype, lambda: recipe.build(*(_values(part) for part in parts), key))


def _recipe(recipes: Mapping[str, _T], name: str) -> _T | None:
    """Return the entry whose key ends the parameter's name, at a dot."""
    return next((recipe for suffix, recipe in recipes.items() if f".{name}".endswith(f".{suffix}")), None)


def _values(tensor: GgufTensor) -> torch.Tensor:
    return dequantize(torch.from_numpy(np.array(tensor.data)), tensor.ggml_type, tensor.shape)


def _check_shape(file: GgufFile, gguf_name: str, found: tuple[int, ...], name: str, wanted: tuple[int, ...]) -> None:
    if tuple(found) != tuple(wanted):
        raise ModelError(
            f"{file.path}: tensor {gguf_name} has shape {list(found)}, the configuration wants {list(wanted)} for "
            f"{name}; the GGUF file and the configuration belong to different models"
        )
