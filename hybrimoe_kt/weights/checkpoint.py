"""Hugging Face checkpoints without GGUF: what safetensors files hold, plain or quantised, and dense tensors lazily."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from hybrimoe_kt.errors import ModelError, first_line

from .lazy import LazyTensor, Load, Where
from .packed_formats import scaled

__all__ = ["Checkpoint", "ExpertNames", "is_checkpoint", "scale_of"]

_TYPES = {"F16": torch.float16, "F32": torch.float32, "BF16": torch.bfloat16, "I64": torch.int64}
_FP8 = "F8_E4M3"
_SCALES = "_scale_inv", "_scale"
"""What follows an FP8 tensor's name in that of its scales; both multiply. DeepSeek-V4's are called `scale_of` it."""
_BLOCK = (128, 128)
"""Numbers that share a scale where the configuration does not say how many."""
_BESIDE = re.compile(r"(?:_blocks|_scales|_bias|_scale_inv|_scale)?")
"""What may follow the name of an expert's matrix in those of what belongs to it."""


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """What a family's checkpoints call a layer's experts, behind `layers.N.`.

    `{expert}` in a name means a tensor for each expert, else they are stacked. Stacked gate and up are one tensor
    under one name, the first half of its rows the gate's. Experts without a gate have no name for it.
    """

    gate: str
    up: str
    down: str
    is_transposed: bool = False
    """Stacked matrices are `[num_experts, in, out]`, but for packed ones."""
    is_interleaved: bool = False
    """Gate and up take turns instead."""
    may_be_transposed: bool = False
    """Whether some files have stacked ones so."""

    @classmethod
    def like(cls, pattern: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> ExpertNames:
        """A tensor for each expert, whose names differ in what stands for `{matrix}` in the pattern."""
        first, second, third = (pattern.replace("{matrix}", name) for name in (gate, up, down))
        return cls(first, second, third)


def is_checkpoint(path: str | Path) -> bool:
    """Whether `path` is a directory with safetensors and no GGUF file."""
    folder = Path(path)
    try:
        if not folder.is_dir():
            return False
    except OSError:  # a name that no file system takes
        return False
    return any(folder.glob("*.safetensors")) and not any(folder.glob("*.[gG][gG][uU][fF]"))


def scale_of(name: str) -> str:
    """What DeepSeek-V4 calls the scales of a quantised weight."""
    return f"{name.removesuffix('weight')}scale"


class Checkpoint:
    """The safetensors files of a model directory, mapped; `metadata` is empty, as a GGUF file's is not.

    `expert_names` are those that its family may use, the first that is found in a layer counts.
    """

    def __init__(self, folder: str | Path, expert_names: Sequence[ExpertNames] = ()) -> None:
        self.path = Path(folder)
        self.expert_names = tuple(expert_names)
        self.metadata: dict[str, Any] = {}
        self._files: dict[str, Any] = {}
        self.files = _files(self.path)
        for file in self.files:
            try:
                opened = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                reason = first_line(error)
                raise ModelError(f"{file}: damaged safetensors file ({reason}); download it again") from None
            self._files |= dict.fromkeys(opened.keys(), opened)
        # a model that also sees has its language model one level deeper
        prefixes = ("model.language_model.", "language_model.model.", "model.", "backbone.")
        norms = "norm", "norm_f", "hyper_connection_mixer.hc_norm"
        ends = [(prefix, f"{prefix}{norm}.weight") for prefix in prefixes for norm in norms]
        is_bare = "embed.weight" in self._files and "norm.weight" in self._files  # DeepSeek-V4's names
        self._prefix = "" if is_bare else next((prefix for prefix, norm in ends if norm in self._files), "model.")
        self.scale_block = _BLOCK
        """Rows and columns of FP8 numbers that share a scale."""
        heads = ("lm_head.", "language_model.lm_head.")
        self._head = next((head for head in heads if f"{head}weight" in self._files), heads[0])

    def names(self) -> Iterator[str]:
        return iter(self._files)

    @property
    def num_expert_layers(self) -> int:
        """How many layers have routed experts."""
        routed, numbered = self._routed(), re.compile(r"layers\.(\d+)\.")
        found = (numbered.search(name) for name in self._files if routed.fullmatch(name))
        return len({match[1] for match in found if match})

    def layer_tensor(self, layer: int, name: str) -> str:
        """The full name of a layer's tensor."""
        return f"{self._prefix}layers.{layer}.{name}"

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def describe(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Type and shape of a tensor; ModelError for a missing one, or a type that cannot be read.

        FP8 with scales is what its values are made of: float8_e4m3fn.
        """
        kind, shape = self.stored(name)
        if kind == _FP8 and self._scales_of(name) is not None:
            return torch.float8_e4m3fn, shape
        if kind not in _TYPES:
            raise ModelError(
                f"{self.path}: {name} is {kind}{' without scales' if kind == _FP8 else ''}; checkpoints of F32, F16, "
                f"BF16, FP8 in scaled blocks and MXFP4 experts can be read, for others use a GGUF file of the model"
            )
        return _TYPES[kind], shape

    def stored(self, name: str) -> tuple[str, tuple[int, ...]]:
        """The name of the type that a tensor is stored in, and its shape; ModelError for a missing one."""
        if name not in self._files:
            raise ModelError(f"{self.path}: tensor {name!r} is missing from the safetensors files")
        found = self._files[name].get_slice(name)
        return found.get_dtype(), tuple(found.get_shape())

    def read(self, name: str, expert: int | None = None) -> torch.Tensor:
        """Values, as they are stored or float32 of FP8; of stacked matrices all, or those of one `expert`."""
        values = self._part(name, expert)
        scales = self._scales_of(name) if values.dtype == torch.float8_e4m3fn else None
        if scales is None:
            return values
        of_each = expert is not None and self.stored(scales)[1][:1] == self.stored(name)[1][:1]
        factors = self._part(scales, expert if of_each else None)
        block = self._block(name, values.shape[-2:], factors)
        return scaled(values, factors, block)

    def read_bytes(self, name: str) -> torch.Tensor:
        """A tensor of bytes, whatever they are called, uint8."""
        return self._part(name, None).view(torch.uint8)

    def _part(self, name: str, expert: int | None) -> torch.Tensor:
        file = self._files[name]
        found: torch.Tensor = file.get_tensor(name) if expert is None else file.get_slice(name)[expert]
        return found

    def _scales_of(self, name: str) -> str | None:
        candidates = (*(name + ending for ending in _SCALES), scale_of(name))
        return next((found for found in candidates if found in self._files and found != name), None)

    def _block(self, name: str, shape: torch.Size, scales: torch.Tensor) -> tuple[int, int]:
        """How many rows and columns share a scale: as the configuration says, or all, or one, as there are scales."""
        if scales.numel() == 1:
            return self.scale_block
        given = zip(
            shape, scales.shape[-2:] if scales.dim() > 1 else (scales.numel(), 1), self.scale_block, strict=True
        )
        sizes = [
            next((size for size in (usual, 1, length) if -(-length // size) == count), 0)
            for length, count, usual in given
        ]
        if 0 in sizes:
            raise ModelError(
                f"{self.path}: {name} is {list(shape)} with {list(scales.shape)} scales, not one for every "
                f"{self.scale_block[0]}x{self.scale_block[1]}; the weights and the configuration belong to different "
                f"models"
            )
        return sizes[0], sizes[1]

    def dense_state(self, dtype: torch.dtype, float32: tuple[str, ...], where: Where) -> dict[str, LazyTensor]:
        """The language model's tensors but the routed experts, under the checkpoint's names, read when asked for."""
        state = {}
        routed = self._routed()
        for name in self.names():
            if name.startswith((self._prefix, self._head)) and not routed.fullmatch(name) and not self._is_scale(name):
                stored, shape = self.describe(name)
                kept = torch.float32 if name.endswith(float32) else dtype
                kept = kept if stored.is_floating_point else stored
                plain = f"model.{name.removeprefix(self._prefix)}"
                plain = plain if name.startswith(self._prefix) else f"lm_head.{name.removeprefix(self._head)}"
                # what has names of its own is named by Transformers
                state[plain if self._prefix else name] = LazyTensor(shape, kept, where(plain), self._load(name))
        return state

    def _routed(self) -> re.Pattern[str]:
        """What matches the full names of routed experts' tensors."""
        patterns = {name for names in self.expert_names for name in (names.gate, names.up, names.down) if name}
        any_of = "|".join(re.escape(pattern).replace(r"\{expert\}", r"\d+") for pattern in sorted(patterns))
        return re.compile(rf"{re.escape(self._prefix)}layers\.\d+\.(?:{any_of or '(?!)'}){_BESIDE.pattern}")

    def _is_scale(self, name: str) -> bool:
        """Whether it only says how another tensor is to be read."""
        owners = [name.removesuffix(ending) for ending in _SCALES if name.endswith(ending)]
        owners += [f"{name.removesuffix('scale')}weight"] if name.endswith(".scale") else []
        return any(owner in self._files for owner in owners) or name.endswith((".input_scale", ".activation_scale"))

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
