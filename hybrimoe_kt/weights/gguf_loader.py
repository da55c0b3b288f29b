"""What operators are given as `gguf_loader`: the file's experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from hybrimoe_kt.device.experts import FLOAT32, ROLES, ExpertMatrix, LayerExperts
from hybrimoe_kt.device.packed import PackedMatrix, PackedWeight
from hybrimoe_kt.errors import ModelError
from hybrimoe_kt.expert_form import FormOf, plain_form
from hybrimoe_kt.quants import TYPES, row_bytes

from .expert_layers import ExpertLayer
from .gguf_file import GgufFile, GgufTensor
from .lazy import values_of

__all__ = ["GgufLoader"]

FindPacked = Callable[[str, tuple[int, ...]], "PackedWeight | str | None"]


class GgufLoader:
    """Hands out expert weights as views of the mapped file; owns the mapping for as long as the model lives.

    Files with a tensor per expert (Mixtral, before April 2024), or with gate and up in one tensor (an option of
    llama.cpp's converter), are the exceptions: see `_gather` and `_half`.
    """

    def __init__(self, file: GgufFile, find_packed: FindPacked | None = None, form_of: FormOf = plain_form) -> None:
        """`form_of` a layer's experts.

        `find_packed(parameter, shape)` gives a dense matrix as it stands, or says why not; without it none is.
        """
        self.file, self._find_packed, self._form_of = file, find_packed, form_of
        self.packed: dict[str, PackedMatrix] = {}
        """Every tensor handed out to stay as it is, by its name."""
        self.dequantised: dict[str, str] = {}
        """Parameter -> why it cannot stay as it is, though it was to."""
        self.tensor_device_map: dict[str, dict[str, Any]] = {}
        """Module path -> kwargs of the rule that decided it."""
        self._gathered: dict[tuple[int, str], GgufTensor] = {}

    def layer_experts(self, layer: int, *, num_experts: int, top_k: int, hidden: int, inter: int) -> LayerExperts:
        """Return one layer's routed experts in place; ModelError when the file lacks or contradicts them."""
        shape = ExpertLayer(layer, num_experts, top_k, hidden, inter)
        return self._layer(shape, self._stacked, _matrix, _values)

    def layer_outline(self, layer: int, *, num_experts: int, top_k: int, hidden: int, inter: int) -> LayerExperts:
        """Return what `layer_experts` does but without weights: on the meta device, read from the header alone."""
        shape = ExpertLayer(layer, num_experts, top_k, hidden, inter)
        return self._layer(shape, self._without_data, _outline, lambda bias: _outline(replace(bias, ggml_type=FLOAT32)))

    def _layer(
        self,
        shape: ExpertLayer,
        find: Callable[[int, str, int], GgufTensor],
        matrix: Callable[[GgufTensor], ExpertMatrix],
        bias: Callable[[GgufTensor], ExpertMatrix],
    ) -> LayerExperts:
        """`find` gives one role's tensor of a layer and number of experts."""
        layer, num_experts, hidden, inter = shape.layer, shape.num_experts, shape.hidden, shape.inter
        form = self._form_of(layer)
        roles = ROLES if form.is_gated else ROLES[1:]
        tensors = {role: find(layer, role, num_experts) for role in roles}
        self._check_shapes(tensors, num_experts, hidden, inter)
        named = {role: matrix(tensor) for role, tensor in tensors.items()}
        names = [f"blk.{layer}.ffn_{role}_exps.bias" for role in roles]
        if not form.has_biases and (found := next((name for name in names if name in self.file.tensors), None)):
            raise ModelError(
                f"{self.file.path}: tensor {found} is not used by {self.file.architecture} models here; without it the "
                f"model would be another one"
            )
        biases = [bias(_row_each(self.file.tensor(name))) for name in names if form.has_biases]
        return LayerExperts(
            *shape,
            named.get("gate"),
            named["up"],
            named["down"],
            form,
            tuple(biases),
        )

    def packed_weight(
        self, parameter: str, shape: tuple[int, ...], refuses: Callable[[PackedWeight], str | None] | None = None
    ) -> PackedWeight | None:
        """Return a dense matrix of the model as the file has it; None where the parameter has to be floats.

        `refuses` says why whoever asks cannot use it so.
        """
        found = self._find_packed(parameter, shape) if self._find_packed is not None else None
        if isinstance(found, PackedWeight) and refuses is not None:
            found = refuses(found) or found
        if isinstance(found, str):
            self.dequantised[parameter] = found
            return None
        if found is not None:
            self.packed |= {part.name: part for part in found.parts}
        return found

    def packed_tensor(self, name: str) -> PackedMatrix | None:
        """Return a tensor of the file by its own name, None where it has none or holds float32."""
        tensor = self.file.tensors.get(name)
        if tensor is None or TYPES[tensor.ggml_type].dtype == "float32":
            return None
        found = self.packed[name] = tensor.packed()
        return found

    def _check_shapes(self, tensors: dict[str, GgufTensor], num_experts: int, hidden: int, inter: int) -> None:
        shapes = {"gate": (num_experts, inter, hidden), "up": (num_experts, inter, hidden)}
        shapes["down"] = (num_experts, hidden, inter)
        for role, tensor in tensors.items():
            if tensor.shape != shapes[role]:
                raise ModelError(
                    f"{self.file.path}: tensor {tensor.name} has shape {list(tensor.shape)}, the configuration wants "
                    f"{list(shapes[role])}; the GGUF file and the configuration belong to different models"
                )

    def _stacked(self, layer: int, role: str, num_experts: int) -> GgufTensor:
        """One role's matrices of all experts `[num_experts, rows, columns]`, in place where the file has them so."""
        name, fused = f"blk.{layer}.ffn_{role}_exps.weight", f"blk.{layer}.ffn_gate_up_exps.weight"
        halved = role != "down" and fused in self.file.tensors
        if name in self.file.tensors or not (halved or f"blk.{layer}.ffn_{role}.0.weight" in self.file.tensors):
            return self.file.tensor(name)
        if (layer, role) not in self._gathered:
            copy = self._half(fused, role) if halved else self._gather(layer, role, num_experts)
            self._gathered[layer, role] = copy
            self.file.release_pages()
        return self._gathered[layer, role]

    def _half(self, fused: str, role: str, *, copy: bool = True) -> GgufTensor:
        """Copy the gates, or the ups, out of a tensor `[num_experts, 2 * rows, columns]` that has both in turn.

        Without `copy` only name, type and shape are right.
        """
        tensor = self.file.tensor(fused)
        if len(tensor.shape) != 3 or tensor.shape[1] % 2:
            raise ModelError(f"{self.file.path}: {fused} has shape {list(tensor.shape)}, which is not gate above up")
        num_experts, rows, columns = tensor.shape
        shape = (num_experts, rows // 2, columns)
        if not copy:
            return GgufTensor(fused, shape, tensor.ggml_type, tensor.data)
        half = tensor.data.reshape(num_experts, 2, -1)[:, 0 if role == "gate" else 1]
        return GgufTensor(fused, shape, tensor.ggml_type, np.ascontiguousarray(half).reshape(-1))

    def _gather(self, layer: int, role: str, num_experts: int) -> GgufTensor:
        """Copy an old file's tensor per expert next to each other.

        Such files interleave the three roles, so no view can stack them. The copy is then the one host copy:
        the mapping's pages are dropped after each, and nothing reads them again.
        """
        parts = self._parts(layer, role, num_experts)
        data = np.concatenate([part.data for part in parts])
        return GgufTensor(f"{parts[0].name} and following", (num_experts, *parts[0].shape), parts[0].ggml_type, data)

    def _without_data(self, layer: int, role: str, num_experts: int) -> GgufTensor:
        name, fused = f"blk.{layer}.ffn_{role}_exps.weight", f"blk.{layer}.ffn_gate_up_exps.weight"
        if name not in self.file.tensors and role != "down" and fused in self.file.tensors:
            return self._half(fused, role, copy=False)
        if name in self.file.tensors or f"blk.{layer}.ffn_{role}.0.weight" not in self.file.tensors:
            return self.file.tensor(name)
        first = self._parts(layer, role, num_experts)[0]
        return GgufTensor(f"{first.name} and following", (num_experts, *first.shape), first.ggml_type, first.data)

    def _parts(self, layer: int, role: str, num_experts: int) -> list[GgufTensor]:
        """An old file's tensor per expert, checked to be alike."""
        parts = [self.file.tensor(f"blk.{layer}.ffn_{role}.{index}.weight") for index in range(num_experts)]
        first = parts[0]
        odd = next((part for part in parts if (part.shape, part.ggml_type) != (first.shape, first.ggml_type)), None)
        if odd is not None:
            raise ModelError(
                f"{self.file.path}: {odd.name} is {odd.type_name} {list(odd.shape)}, {first.name} is "
                f"{first.type_name} {list(first.shape)}; the experts of a layer must be alike"
            )
        return parts


def _row_each(tensor: GgufTensor) -> GgufTensor:
    """Biases `[num_experts, features]` as a matrix of one row for each expert."""
    return replace(tensor, shape=(tensor.shape[0], 1, *tensor.shape[1:]))


def _values(tensor: GgufTensor) -> ExpertMatrix:
    """As float32: in place where it is that."""
    if tensor.ggml_type == FLOAT32:
        return _matrix(tensor)
    num_experts, rows, columns = tensor.shape
    values = values_of(tensor, torch.float32, torch.device("cpu")).reshape(num_experts, -1)
    return ExpertMatrix(values.contiguous().view(torch.uint8), FLOAT32, rows, columns)


def _matrix(tensor: GgufTensor) -> ExpertMatrix:
    num_experts, rows, columns = tensor.shape
    return ExpertMatrix(tensor.values().view(num_experts, -1), tensor.ggml_type, rows, columns)


def _outline(tensor: GgufTensor) -> ExpertMatrix:
    num_experts, rows, columns = tensor.shape
    num_bytes = rows * row_bytes(tensor.ggml_type, columns)
    return ExpertMatrix(
        torch.empty(num_experts, num_bytes, dtype=torch.uint8, device="meta"), tensor.ggml_type, rows, columns
    )
