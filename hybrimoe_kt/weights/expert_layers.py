"""Which layers of a GGUF file have routed experts, and how many of what size, from the header alone."""

from __future__ import annotations

import re
from typing import NamedTuple

from hybrimoe_kt.errors import ModelError

from .gguf_file import GgufFile

__all__ = ["ExpertLayer", "expert_layers", "is_expert_tensor", "num_layers"]

_DOWN = re.compile(r"blk\.(\d+)\.ffn_down(?:_exps|\.0)\.weight")
_BLOCK = re.compile(r"blk\.(\d+)\.(nextn\.)?")
_EXPERT = re.compile(r"blk\.\d+\.ffn_(?:gate|up|down|gate_up)(?:_exps\.(?:weight|bias)|\.\d+\.weight)")


class ExpertLayer(NamedTuple):
    """One layer of routed experts, in the words of `GgufLoader.layer_experts`."""

    layer: int
    num_experts: int
    top_k: int
    hidden: int
    inter: int


def expert_layers(file: GgufFile) -> list[ExpertLayer]:
    """Return every layer of routed experts, in order; ModelError when there is none.

    Layers that only guess further tokens ahead are left out: they are not run.
    """
    end, top_k = num_layers(file), _count(file, "expert_used_count")
    found = sorted(int(match[1]) for name in file.tensors if (match := _DOWN.fullmatch(name)))
    layers = [_layer(file, layer, top_k) for layer in found if layer < end and top_k]
    if not layers:
        raise ModelError(f"{file.path}: no layer of routed experts in it; give a Mixture-of-Experts model")
    return layers


def num_layers(file: GgufFile) -> int:
    """How many layers are run: those before the first that only guesses further tokens, which may have been left out.

    ModelError for another number than the metadata has, or where it cannot be told which layers only guess.
    """
    found = [match for name in file.tensors if (match := _BLOCK.match(name))]
    ahead = [int(match[1]) for match in found if match[2]]
    count = min(ahead) if ahead else 1 + max((int(match[1]) for match in found), default=-1)
    stated, guessing = _count(file, "block_count"), _count(file, "nextn_predict_layers")
    if count not in (stated, stated - guessing):
        raise ModelError(f"{file.path}: holds {count} layers, its metadata says {stated}")
    if guessing and not ahead and count == stated:
        raise ModelError(
            f"{file.path}: {guessing} of its {stated} layers should only guess further tokens, but none looks like it; "
            f"--override-kv {file.architecture}.nextn_predict_layers=int:0 runs all"
        )
    return count


def _layer(file: GgufFile, layer: int, top_k: int) -> ExpertLayer:
    stacked = file.tensors.get(f"blk.{layer}.ffn_down_exps.weight")
    tensor = stacked or file.tensor(f"blk.{layer}.ffn_down.0.weight")
    shape = tensor.shape if stacked else (_count(file, "expert_count"), *tensor.shape)
    if len(shape) != 3:
        raise ModelError(f"{file.path}: damaged GGUF: {tensor.name} has shape {list(tensor.shape)}")
    num_experts, hidden, inter = shape
    return ExpertLayer(layer, num_experts, top_k, hidden, inter)


def is_expert_tensor(name: str) -> bool:
    """Whether a tensor belongs to routed experts; shared experts are dense."""
    return _EXPERT.fullmatch(name) is not None


def _count(file: GgufFile, key: str) -> int:
    value = file.metadata.get(f"{file.architecture}.{key}", 0)
    if not isinstance(value, int):
        raise ModelError(f"{file.path}: damaged GGUF: {file.architecture}.{key} is {value!r}, not a number")
    return value
