"""Dense weights: each parameter of the model found in the GGUF file, checked, and dequantised when asked for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import torch
from gguf.tensor_mapping import TensorNameMap

from hybrimoe_kt.device.packed import PackedMatrix, PackedWeight
from hybrimoe_kt.errors import ModelError
from hybrimoe_kt.quants import TYPES
from hybrimoe_kt.weights.gguf_file import GgufFile, GgufTensor
from hybrimoe_kt.weights.lazy import LazyTensor, Load, Where, values_of

from .architectures import Architecture, Composed, Key, Transform

__all__ = ["ROWS_FROM", "dense_state_dict", "packed_weight", "used_tensors"]

_T = TypeVar("_T")
ROWS_FROM = ":"
"""Between a tensor's name and the number of its first row, in the name of a part of it."""
_HEAD, _EMBEDDING = "output.weight", "token_embd.weight"
_LAYER = re.compile(r"\.layers\.(\d+)\.")


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
    names = architecture.name_map(_num_blocks(parameters))
    state: dict[str, LazyTensor] = {}
    for name, shape in parameters.items():
        listed = _recipe(architecture.stated, name)
        if listed is not None:
            load = _listed(architecture.key(file), file, listed, name, shape)
            state[name] = LazyTensor(shape, torch.int64, where(name), load)
            continue
        gguf_name = _as_stored(file, _gguf_name(architecture, names, name))
        kept = torch.float32 if name.endswith(architecture.float32) else dtype
        if gguf_name not in file.tensors and name.endswith(architecture.zero):
            state[name] = LazyTensor(shape, kept, where(name), partial(_zeros, shape))
            continue
        if gguf_name in file.tensors and TYPES[file.tensors[gguf_name].ggml_type].name == "I32":
            load, kept = _numbers(file, file.tensors[gguf_name], name, shape), torch.int64
        elif gguf_name in file.tensors:
            load = _single(file, architecture, file.tensors[gguf_name], name, shape)
        else:
            load = _composed(file, architecture, name, gguf_name, shape)
        state[name] = LazyTensor(shape, kept, where(name), load)
    return state


def used_tensors(file: GgufFile, architecture: Architecture, parameters: Iterable[str]) -> tuple[set[str], set[str]]:
    """Return the names of the tensors that these parameters are made of, as far as the file has them.

    And of those that they would be made of if the file had not what they make as well.
    """
    names, used, spare = architecture.name_map(_num_blocks(parameters)), set[str](), set[str]()
    for name in parameters:
        layer, recipe = _LAYER.search(name), _recipe(architecture.composed, name)
        found = _as_stored(file, _gguf_name(architecture, names, name))
        parts = recipe.parts if recipe is not None and layer is not None else ()
        used.add(found or "")
        others = spare if found in file.tensors else used
        others |= {part.format(layer=layer[1]) for part in parts if layer is not None}
    return used & file.tensors.keys(), spare & file.tensors.keys()


def packed_weight(
    file: GgufFile, architecture: Architecture, name: str, shape: tuple[int, ...]
) -> PackedWeight | str | None:
    """Return a matrix as the file has it; why it must be dequantised, or None where the file itself holds floats.

    ModelError as of `dense_state_dict`.
    """
    found = _as_stored(file, _gguf_name(architecture, architecture.name_map(_num_blocks((name,))), name))
    recipe: Transform | Composed | None
    if found in file.tensors:
        tensors, recipe = [file.tensors[found]], _recipe(architecture.transforms, name)
    else:
        layer, recipe = _LAYER.search(name), _recipe(architecture.composed, name)
        if recipe is None or layer is None:
            return None  # told by what loads floats
        tensors = [file.tensor(part.format(layer=layer[1])) for part in recipe.parts]
    if all(TYPES[tensor.ggml_type].dtype == "float32" for tensor in tensors):
        return None
    if recipe is not None and recipe.moves is None:
        return f"{name} is computed from {' and '.join(tensor.name for tensor in tensors)}"
    if any(len(tensor.shape) != 2 for tensor in tensors):
        return None
    shapes = [tensor.shape for tensor in tensors]
    found_shape = shapes[0] if recipe is None else _shape_of(recipe, shapes, architecture.key(file))
    _check_shape(file, " + ".join(tensor.name for tensor in tensors), found_shape, name, shape)
    parts = tuple(tensor.packed() for tensor in tensors)
    return PackedWeight(parts) if recipe is None else _in_order(parts, recipe, architecture.key(file))


def _shape_of(recipe: Transform | Composed, shapes: Sequence[tuple[int, ...]], key: Key) -> tuple[int, ...]:
    return recipe.shape(*shapes, key) if isinstance(recipe, Composed) else recipe.shape(shapes[0])


def _in_order(parts: tuple[PackedMatrix, ...], recipe: Transform | Composed, key: Key) -> PackedWeight:
    """Find the order that a recipe puts rows or columns into by giving it their numbers."""
    build: Callable[..., torch.Tensor] = recipe.build
    if recipe.moves == "columns":
        numbers = torch.arange(parts[0].columns, dtype=torch.int64, device="cpu")[None]
        return PackedWeight(parts, column_order=build(numbers, key)[0].argsort())
    sizes = [part.rows for part in parts]
    numbers = torch.arange(sum(sizes), dtype=torch.int64, device="cpu")[:, None]
    order = build(*numbers.split(sizes), key)[:, 0]
    if len(parts) == 1 and torch.equal(order, torch.arange(len(order), device="cpu") + order[0]):
        return PackedWeight((_rows(parts[0], int(order[0]), len(order)),))
    return PackedWeight(parts, row_order=order)


def _rows(matrix: PackedMatrix, start: int, count: int) -> PackedMatrix:
    """Some of a matrix's rows, in place."""
    row_bytes = len(matrix.data) // matrix.rows
    data = matrix.data[start * row_bytes : (start + count) * row_bytes]
    return PackedMatrix(f"{matrix.name}{ROWS_FROM}{start}", data, matrix.ggml_type, count, matrix.columns)


def _num_blocks(parameters: Iterable[str]) -> int:
    return 1 + max((int(match[1]) for name in parameters if (match := _LAYER.search(name))), default=0)


def _gguf_name(architecture: Architecture, names: TensorNameMap, name: str) -> str | None:
    """Return what the family calls a parameter in a file, None where the parameter has no name there."""
    own, layer = _recipe(architecture.names, name), _LAYER.search(name)
    if own is not None:
        return own.format(layer=layer[1] if layer else "")
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    suffix = name.rpartition(".")[2]
    return found if found is None or found.endswith(suffix) else f"{found}.{suffix}"


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def _numbers(file: GgufFile, tensor: GgufTensor, name: str, shape: tuple[int, ...]) -> Load:
    """Whole numbers, as the file has them."""
    _check_shape(file, tensor.name, tensor.shape, name, shape)
    return lambda dtype, device: tensor.values().view(torch.int32).view(shape).to(device, dtype)


def _listed(key: Key, file: GgufFile, listed: str, name: str, shape: tuple[int, ...]) -> Load:
    """What the metadata lists, whole numbers."""
    values = key(listed, [], of_each_layer=True)
    _check_shape(file, listed, (len(values),), name, shape)
    return lambda dtype, device: torch.tensor(values, dtype=dtype, device=device)


def _as_stored(file: GgufFile, name: str | None) -> str | None:
    """The name itself, or as Ollama's converter has it: a bias that stands alone without its ending.

    A head that the file lacks is the embedding.
    """
    if name == _HEAD and name not in file.tensors:
        return _EMBEDDING
    bare = (name or "").removesuffix(".bias")
    return bare if name not in file.tensors and bare != name and bare in file.tensors else name


def _single(file: GgufFile, architecture: Architecture, tensor: GgufTensor, name: str, shape: tuple[int, ...]) -> Load:
    transform, key = _recipe(architecture.transforms, name), architecture.key(file)
    _check_shape(file, tensor.name, transform.shape(tensor.shape) if transform else tensor.shape, name, shape)
    if transform is None:
        return lambda dtype, device: values_of(tensor, dtype, device)
    return lambda dtype, device: transform.build(values_of(tensor, torch.float32, device), key).to(dtype)


def _composed(
    file: GgufFile, architecture: Architecture, name: str, gguf_name: str | None, shape: tuple[int, ...]
) -> Load:
    layer = _LAYER.search(name)
    recipe = _recipe(architecture.composed, name)
    if recipe is None or layer is None:
        raise ModelError(f"{file.path}: no tensor for {name} (expected {gguf_name or 'a name this family lacks'})")
    parts = [file.tensor(part.format(layer=layer[1])) for part in recipe.parts]
    key = architecture.key(file)
    found_shape = _shape_of(recipe, [part.shape for part in parts], key)
    _check_shape(file, " + ".join(part.name for part in parts), found_shape, name, shape)
    return lambda dtype, device: recipe.build(*(values_of(part, torch.float32, device) for part in parts), key).to(
        dtype
    )


def _recipe(recipes: Mapping[str, _T], name: str) -> _T | None:
    """Return the entry whose key ends the parameter's name, at a dot."""
    return next((recipe for suffix, recipe in recipes.items() if f".{name}".endswith(f".{suffix}")), None)


def _check_shape(file: GgufFile, gguf_name: str, found: tuple[int, ...], name: str, wanted: tuple[int, ...]) -> None:
    if tuple(found) != tuple(wanted):
        raise ModelError(
            f"{file.path}: tensor {gguf_name} has shape {list(found)}, the configuration wants {list(wanted)} for "
            f"{name}; the GGUF file and the configuration belong to different models"
        )
