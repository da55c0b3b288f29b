"""A checkpoint's experts as the one host copy that backends read: gathered, and packed where they are packed there.

BF16, which kt-kernel's llamafile backend gets wrong, becomes F16: the same numbers from 6e-5 to 65504 in size; smaller
ones keep an absolute error of 3e-8, larger ones are refused. MXFP4 keeps its values in GGUF's order. FP8 becomes Q8_0,
once: the result is kept in a folder, see `ConvertedExperts`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from gguf import GGMLQuantizationType

from hybrimoe_kt.device.experts import FLOAT32, ROLES, ExpertMatrix, LayerExperts
from hybrimoe_kt.device.packed import PackedMatrix
from hybrimoe_kt.errors import ModelError
from hybrimoe_kt.expert_form import FormOf, plain_form
from hybrimoe_kt.quants import row_bytes

from .checkpoint import Checkpoint, ExpertNames, scale_of
from .converted_experts import ConvertedExperts
from .packed_formats import MXFP4_VALUES, Q8_0_VALUES, mxfp4_blocks, q8_0_blocks

__all__ = ["CheckpointLoader"]

_F16, _Q8_0, _MXFP4 = (int(GGMLQuantizationType[name]) for name in ("F16", "Q8_0", "MXFP4"))
_HELD = {torch.float16: _F16, torch.bfloat16: _F16, torch.float32: FLOAT32, torch.float8_e4m3fn: _Q8_0}
_PACKED = "_blocks", "_scales"
"""What follows the name of packed stacked matrices: numbers and exponents."""
_NIBBLES = "I8", "U8"
_EXPONENTS = "F8_E8M0", "U8"
"""Types that one expert's packed matrix is stored in, two numbers to a byte, and its exponents."""


@dataclass(frozen=True, slots=True)
class _Role:
    """One matrix of each expert of a layer in the files."""

    name: str
    pattern: str
    """Full tensor name, `{expert}` in it or not."""
    rows: int
    columns: int
    place: slice
    """Of its rows among those of a tensor that it may share."""
    total: int
    """Rows of that tensor."""
    is_transposed: bool

    @property
    def is_stacked(self) -> bool:
        return "{expert}" not in self.pattern

    def tensor(self, expert: int) -> str:
        return self.pattern.format(expert=expert)


class CheckpointLoader:
    """What operators are given as `gguf_loader`: the checkpoint's experts."""

    def __init__(self, file: Checkpoint, form_of: FormOf = plain_form) -> None:
        """`form_of` a layer's experts."""
        self.file, self._form_of = file, form_of
        self.tensor_device_map: dict[str, dict[str, Any]] = {}
        self._layers: dict[int, LayerExperts] = {}
        self._converted = ConvertedExperts(file)
        self.packed: dict[str, PackedMatrix] = {}
        self.dequantised: dict[str, str] = {}
        """Both empty: dense weights are floats."""

    def layer_experts(self, layer: int, *, num_experts: int, top_k: int, hidden: int, inter: int) -> LayerExperts:
        """Return one layer's routed experts, gathered once; ModelError when the files lack or contradict them."""
        if layer not in self._layers:
            form = self._form_of(layer)
            roles = self._roles(layer, hidden, inter)
            with torch.device("cpu"):  # operators are constructed where everything lands on the meta device
                matrices = self._matrices(layer, roles, num_experts)
                biases = [self._bias(role, num_experts) for role in roles if form.has_biases]
            self._layers[layer] = LayerExperts(
                layer,
                num_experts,
                top_k,
                hidden,
                inter,
                matrices.get("gate"),
                matrices["up"],
                matrices["down"],
                form,
                tuple(biases),
            )
        return self._layers[layer]

    def packed_weight(self, parameter: str, shape: tuple[int, ...], refuses: object = None) -> None:
        """None for every parameter."""

    def packed_tensor(self, name: str) -> None:
        """None as well."""

    def _names(self, layer: int) -> ExpertNames:
        for names in self.file.expert_names:
            found = self.file.layer_tensor(layer, names.down.format(expert=0))
            if found in self.file or found + _PACKED[0] in self.file:
                return names
        looked_for = ", ".join(self.file.layer_tensor(layer, names.down) for names in self.file.expert_names)
        raise ModelError(f"{self.file.path}: layer {layer} holds no routed experts; looked for {looked_for}")

    def _roles(self, layer: int, hidden: int, inter: int) -> list[_Role]:
        names = self._names(layer)
        shapes = {"gate": (inter, hidden), "up": (inter, hidden), "down": (hidden, inter)}
        roles = []
        for role in ROLES if self._form_of(layer).is_gated else ROLES[1:]:
            pattern, (rows, columns) = getattr(names, role), shapes[role]
            place, total = slice(0, rows), rows
            if names.gate == names.up and role != "down":
                first = role == "up"
                place = slice(first, None, 2) if names.is_interleaved else slice(first * rows, (first + 1) * rows)
                total = 2 * rows
            full = self.file.layer_tensor(layer, pattern)
            roles.append(_Role(role, full, rows, columns, place, total, names.is_transposed))
        if names.may_be_transposed and self._is_transposed(roles):
            return [replace(role, is_transposed=True) for role in roles]
        return roles

    def _is_transposed(self, roles: list[_Role]) -> bool:
        """Told by the first stacked tensor that is not as wide as it is high."""
        uneven = (role for role in roles if role.is_stacked and role.total != role.columns)
        found = next(((role, self.file.stored(role.pattern)[1]) for role in uneven if role.pattern in self.file), None)
        return found is not None and found[1][1:] == (found[0].columns, found[0].total)

    def _matrices(self, layer: int, roles: list[_Role], num_experts: int) -> dict[str, ExpertMatrix]:
        types = {role.name: self._checked_type(role, num_experts) for role in roles}

        def make(role: _Role) -> torch.Tensor:
            encode = _encoder(types[role.name], self.file, role)
            data = torch.empty(num_experts, role.rows * row_bytes(types[role.name], role.columns), dtype=torch.uint8)
            for expert in range(num_experts):
                data[expert] = encode(expert)
            return data

        if _Q8_0 in types.values():
            parts, made_of = {role.name: role for role in roles}, (num_experts, roles, types)
            made = self._converted.layer(layer, made_of, lambda: {name: make(role) for name, role in parts.items()})
        else:
            made = {role.name: make(role) for role in roles}
        return {role.name: ExpertMatrix(made[role.name], types[role.name], role.rows, role.columns) for role in roles}

    def _checked_type(self, role: _Role, num_experts: int) -> int:
        """The type in which it is held; ModelError for files that hold something else than is wanted."""
        if role.is_stacked and role.pattern + _PACKED[0] in self.file:
            return self._checked_packed(role, num_experts)
        names = [role.tensor(expert) for expert in range(num_experts)]
        if not role.is_stacked and names[0] in self.file and self.file.stored(names[0])[0] in _NIBBLES:
            return self._checked_nibbles(role, num_experts)
        kinds = {name: self.file.describe(name) for name in dict.fromkeys(names)}
        flat = (role.columns, role.total) if role.is_stacked and role.is_transposed else (role.total, role.columns)
        wanted = (num_experts, *flat) if role.is_stacked else flat
        first = kinds[names[0]][0]
        for name, (kind, found) in kinds.items():
            if found != wanted or kind != first:
                raise ModelError(
                    f"{self.file.path}: tensor {name} is {kind} {list(found)}, the configuration wants {list(wanted)} "
                    f"and all experts alike; the weights and the configuration belong to different models"
                )
        held = _HELD[first]
        return _F16 if held == _Q8_0 and role.columns % Q8_0_VALUES else held

    def _checked_packed(self, role: _Role, num_experts: int) -> int:
        blocks = role.columns // MXFP4_VALUES
        for ending, wanted in zip(_PACKED, ((blocks, MXFP4_VALUES // 2), (blocks,)), strict=True):
            kind, found = self.file.stored(role.pattern + ending)
            if kind != "U8" or found != (num_experts, role.total, *wanted):
                raise ModelError(
                    f"{self.file.path}: tensor {role.pattern}{ending} is {kind} {list(found)}, the configuration wants "
                    f"U8 {[num_experts, role.total, *wanted]}; the weights and the configuration belong to "
                    f"different models"
                )
        return _MXFP4

    def _checked_nibbles(self, role: _Role, num_experts: int) -> int:
        for expert in range(num_experts):
            numbers = role.tensor(expert)
            wanted = (
                (numbers, _NIBBLES, (role.rows, role.columns // 2)),
                (scale_of(numbers), _EXPONENTS, (role.rows, role.columns // MXFP4_VALUES)),
            )
            for name, kinds, shape in wanted:
                kind, found = self.file.stored(name)
                if kind not in kinds or found != shape:
                    raise ModelError(
                        f"{self.file.path}: tensor {name} is {kind} {list(found)}, the configuration wants "
                        f"{' or '.join(kinds)} {list(shape)}; the weights and the configuration belong to different "
                        f"models"
                    )
        return _MXFP4

    def _bias_name(self, role: _Role) -> str:
        return f"{role.pattern}_bias"

    def _bias(self, role: _Role, num_experts: int) -> ExpertMatrix:
        name = self._bias_name(role)
        _, shape = self.file.describe(name)
        if shape != (num_experts, role.total):
            raise ModelError(
                f"{self.file.path}: tensor {name} is {list(shape)}, the configuration wants {[num_experts, role.total]}"
            )
        values = self.file.read(name)[:, role.place].float().contiguous()
        return ExpertMatrix(values.view(torch.uint8), FLOAT32, 1, role.rows)


def _encoder(ggml_type: int, file: Checkpoint, role: _Role) -> Callable[[int], torch.Tensor]:
    """What returns an expert's matrix in GGUF's bytes, uint8, flat."""

    def values(expert: int) -> torch.Tensor:
        found = file.read(role.tensor(expert), expert if role.is_stacked else None)
        return (found.T if role.is_stacked and role.is_transposed else found)[role.place]

    def packed(expert: int) -> torch.Tensor:
        if role.is_stacked:
            numbers, exponents = (file.read(role.pattern + ending, expert)[role.place] for ending in _PACKED)
        else:
            name = role.tensor(expert)
            numbers = file.read_bytes(name).unflatten(-1, (-1, MXFP4_VALUES // 2))
            exponents = file.read_bytes(scale_of(name))
        return mxfp4_blocks(numbers, exponents).flatten()

    def plain(expert: int) -> torch.Tensor:
        dtype = torch.float32 if ggml_type == FLOAT32 else torch.float16
        found = values(expert)
        return _in_range(file, role.tensor(expert), found, dtype).to(dtype).contiguous().view(torch.uint8).flatten()

    if ggml_type == _MXFP4:
        return packed
    return (lambda expert: q8_0_blocks(values(expert)).flatten()) if ggml_type == _Q8_0 else plain


def _in_range(file: Checkpoint, name: str, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    largest = float(values.abs().max()) if dtype == torch.float16 != values.dtype else 0.0
    if not largest <= torch.finfo(torch.float16).max:
        raise ModelError(
            f"{file.path}: {name} holds {largest:.3g}, beyond the 65504 of F16 that these experts are "
            f"converted to; use a GGUF file of the model"
        )
    return values
