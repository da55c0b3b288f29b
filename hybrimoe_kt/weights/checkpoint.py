"""Hugging Face checkpoints without GGUF: dense tensors lazily, experts as the one host copy that backends read.

A layer's experts are gathered from the safetensors files into three matrices of F16 or F32. BF16, which kt-kernel's
llamafile backend gets wrong, becomes F16: the same numbers from 6e-5 to 65504 in size; smaller ones keep an absolute
error of 3e-8, larger ones are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType
from safetensors import SafetensorError, safe_open

from hybrimoe_kt.device.experts import ExpertMatrix, LayerExperts
from hybrimoe_kt.device.packed import PackedMatrix
from hybrimoe_kt.errors import ModelError, first_line

from .lazy import LazyTensor, Load, Where

__all__ = ["Checkpoint", "CheckpointLoader", "ExpertNames", "is_checkpoint"]

_TYPES = {"F16": torch.float16, "F32": torch.float32, "BF16": torch.bfloat16}
_HELD = {
    torch.float16: (GGMLQuantizationType.F16, torch.float16),
    torch.bfloat16: (GGMLQuantizationType.F16, torch.float16),
    torch.float32: (GGMLQuantizationType.F32, torch.float32),
}


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """What a family's checkpoints call a layer's experts, behind `layers.N.`.

    `{expert}` in a name means a tensor for each expert, else they are stacked. Stacked gate and up are one tensor
    under one name, the first half of its rows the gate's.
    """

    gate: str
    up: str
    down: str
    may_be_transposed: bool = field(default=False, kw_only=True)
    """Whether some files have the rows of stacked ones for what goes in, and the columns for what comes out."""


def is_checkpoint(path: str | Path) -> bool:
    """Whether `path` is a directory with safetensors and no GGUF file."""
    folder = Path(path)
    try:
        if not folder.is_dir():
            return False
    except OSError:  # a name that no file system takes
        return False
    return any(folder.glob("*.safetensors")) and not any(folder.glob("*.[gG][gG][uU][fF]"))


class Checkpoint:
    """The safetensors files of a model directory, mapped; `metadata` is empty, as a GGUF file's is not.

    `expert_names` are those that its family may use, the first that is found in a layer counts.
    """

    def __init__(self, folder: str | Path, expert_names: Sequence[ExpertNames] = ()) -> None:
        self.path = Path(folder)
        self.expert_names = tuple(expert_names)
        self.metadata: dict[str, Any] = {}
        self._files: dict[str, Any] = {}
        for file in _files(self.path):
            try:
                opened = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                reason = first_line(error)
                raise ModelError(f"{file}: damaged safetensors file ({reason}); download it again") from None
            self._files |= dict.fromkeys(opened.keys(), opened)
        # a model that also sees has its language model one level deeper
        prefixes = ("model.language_model.", "language_model.model.", "model.")
        self._prefix = next((prefix for prefix in prefixes if f"{prefix}norm.weight" in self._files), "model.")
        heads = ("lm_head.", "language_model.lm_head.")
        self._head = next((head for head in heads if f"{head}weight" in self._files), heads[0])

    def names(self) -> Iterator[str]:
        return iter(self._files)

    def layer_tensor(self, layer: int, name: str) -> str:
        """The full name of a layer's tensor."""
        return f"{self._prefix}layers.{layer}.{name}"

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def describe(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Type and shape of a tensor; ModelError for a missing one, or a type that is not plain floating point."""
        if name not in self._files:
            raise ModelError(f"{self.path}: tensor {name!r} is missing from the safetensors files")
        found = self._files[name].get_slice(name)
        if found.get_dtype() not in _TYPES:
            raise ModelError(
                f"{self.path}: {name} is {found.get_dtype()}; checkpoints of F32, F16 or BF16 can be read, "
                f"for quantised ones use a GGUF file of the model"
            )
        return _TYPES[found.get_dtype()], tuple(found.get_shape())

    def read(self, name: str) -> torch.Tensor:
        return self._files[name].get_tensor(name)  # type: ignore[no-any-return]

    def dense_state(self, dtype: torch.dtype, float32: tuple[str, ...], where: Where) -> dict[str, LazyTensor]:
        """The language model's tensors but the routed experts, under the checkpoint's names, read when asked for."""
        state = {}
        routed = self._routed()
        for name in self.names():
            if name.startswith((self._prefix, self._head)) and not routed.fullmatch(name):
                _, shape = self.describe(name)
                kept = torch.float32 if name.endswith(float32) else dtype
                plain = f"model.{name.removeprefix(self._prefix)}"
                plain = plain if name.startswith(self._prefix) else f"lm_head.{name.removeprefix(self._head)}"
                state[plain] = LazyTensor(shape, kept, where(plain), self._load(name))
        return state

    def _routed(self) -> re.Pattern[str]:
        """What matches the full names of routed experts' tensors."""
        patterns = {name for names in self.expert_names for name in (names.gate, names.up, names.down)}
        any_of = "|".join(re.escape(pattern).replace(r"\{expert\}", r"\d+") for pattern in sorted(patterns))
        return re.compile(rf"{re.escape(self._prefix)}layers\.\d+\.(?:{any_of or '(?!)'})")

    def _load(self, name: str) -> Load:
        return lambda dtype, device: self.read(name).to(device).to(dtype)  # converted where it will stand

    def release_pages(self) -> None:
        """Nothing to drop: what has been read was copied, and safetensors' mapping is the page cache's."""


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, LookupError, AttributeError, TypeError):
        raise ModelError(f"{index}: not an index of safetensors files; download it again") from None
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelError(f"{folder}: {len(missing)} of {len(names)} safetensors files missing, first {missing[0]!r}")
    return [folder / name for name in names]


class CheckpointLoader:
    """What operators are given as `gguf_loader`: the checkpoint's experts."""

    def __init__(self, file: Checkpoint) -> None:
        self.file = file
        self.tensor_device_map: dict[str, dict[str, Any]] = {}
        self._layers: dict[int, LayerExperts] = {}
        self.packed: dict[str, PackedMatrix] = {}
        self.dequantised: dict[str, str] = {}
        """Both empty: checkpoints hold floats."""

    def layer_experts(self, layer: int, *, num_experts: int, top_k: int, hidden: int, inter: int) -> LayerExperts:
        """Return one layer's routed experts, gathered once; ModelError when the files lack or contradict them."""
        if layer not in self._layers:
            shapes = {"gate": (inter, hidden), "up": (inter, hidden), "down": (hidden, inter)}
            names = self._names(layer)
            with torch.device("cpu"):  # operators are constructed where everything lands on the meta device
                matrices = {
                    role: self._gather(layer, names, role, num_experts, shape) for role, shape in shapes.items()
                }
            self._layers[layer] = LayerExperts(layer, num_experts, top_k, hidden, inter, **matrices)
        return self._layers[layer]

    def packed_weight(self, parameter: str, shape: tuple[int, ...], refuses: object = None) -> None:
        """None for every parameter."""

    def packed_tensor(self, name: str) -> None:
        """None as well."""

    def _names(self, layer: int) -> ExpertNames:
        for names in self.file.expert_names:
            if self.file.layer_tensor(layer, names.down.format(expert=0)) in self.file:
                return names
        looked_for = ", ".join(self.file.layer_tensor(layer, names.down) for names in self.file.expert_names)
        raise ModelError(f"{self.file.path}: layer {layer} holds no routed experts; looked for {looked_for}")

    def _gather(self, layer: int, of: ExpertNames, role: str, num_experts: int, shape: tuple[int, int]) -> ExpertMatrix:
        """Copy one role's matrices of all experts next to each other, in the type that they are held in."""
        pattern: str = getattr(of, role)
        separate = "{expert}" in pattern
        names = [self.file.layer_tensor(layer, pattern.format(expert=index)) for index in range(num_experts)]
        kinds = {name: self.file.describe(name) for name in dict.fromkeys(names)}
        half = not separate and role != "down"
        stacked = (num_experts, shape[0] * (1 + half), shape[1])
        turned = not separate and of.may_be_transposed and self._are_transposed(layer, of, num_experts, shape, role)
        wanted = shape if separate else (stacked[0], stacked[2], stacked[1]) if turned else stacked
        for name, (kind, found) in kinds.items():
            if found != wanted or kind != kinds[names[0]][0]:
                raise ModelError(
                    f"{self.file.path}: tensor {name} is {kind} {list(found)}, the configuration wants {list(wanted)} "
                    f"and all experts alike; the weights and the configuration belong to different models"
                )
        ggml_type, held = _HELD[kinds[names[0]][0]]
        data = torch.empty(num_experts, *shape, dtype=held)
        if separate:
            for index, name in enumerate(names):
                data[index] = _in_range(self.file.path, name, self.file.read(name))
        else:
            begin = shape[0] if role == "up" else 0
            found_all = self.file.read(names[0])
            rows = found_all.transpose(1, 2) if turned else found_all
            data.copy_(_in_range(self.file.path, names[0], rows[:, begin : begin + shape[0]]))
        return ExpertMatrix(data.view(num_experts, -1).view(torch.uint8), int(ggml_type), *shape)

    def _are_transposed(self, layer: int, of: ExpertNames, num_experts: int, shape: tuple[int, int], role: str) -> bool:
        """Told by the first tensor of two that is not as wide as it is high."""
        inter, hidden = shape if role != "down" else shape[::-1]
        for name, rows, columns in ((of.gate, 2 * inter, hidden), (of.down, hidden, inter)):
            if rows != columns:
                return self.file.describe(self.file.layer_tensor(layer, name))[1] == (num_experts, columns, rows)
        return False


def _in_range(path: Path, name: str, values: torch.Tensor) -> torch.Tensor:
    if values.dtype == torch.bfloat16 and not float(values.abs().max()) <= torch.finfo(torch.float16).max:
        raise ModelError(
            f"{path}: {name} holds {float(values.abs().max()):.3g}, beyond the 65504 of F16 that BF16 experts are "
            f"converted to; use a GGUF file of the model"
        )
    return values
