"""Brings dense weights that stay packed to the accelerators that their layers stand on, those of one input together."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from hybrimoe_kt.backends.gpu_dense import DenseSpaces, product_of
from hybrimoe_kt.backends.gpu_up_projections import AcceleratorUpProjections
from hybrimoe_kt.device.choose import device_at
from hybrimoe_kt.device.dense_matrices import DenseMatrices
from hybrimoe_kt.errors import CapacityError
from hybrimoe_kt.operators.attention_mla import AbsorbedMLA
from hybrimoe_kt.operators.linear import QuantizedLinear
from hybrimoe_kt.operators.shared_input import SharedInput

__all__ = ["DenseOnAccelerators"]

_SHARED = (
    ("q_proj", "k_proj", "v_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("q_proj", "kv_a_proj_with_mqa"),
    ("gate_proj", "up_proj"),
    ("in_proj_qkvz", "in_proj_ba"),
    ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
)
"""Linear layers of one module that Transformers' families give the same tensor."""


@dataclass(slots=True)
class _Group:
    layers: tuple[QuantizedLinear, ...]
    matrices: DenseMatrices = field(init=False)

    def __post_init__(self) -> None:
        weights = [layer.packed for layer in self.layers]
        self.matrices = DenseMatrices([weight for weight in weights if weight is not None])


class DenseOnAccelerators:
    """All packed dense weights of a model that stand on accelerators; made from the model, then loaded once."""

    def __init__(self, model: nn.Module) -> None:
        self._groups = [_Group(layers) for layers in _groups(model)]
        self._up = [module for module in model.modules() if isinstance(module, AbsorbedMLA) and _of(module) is not None]
        self._spaces = DenseSpaces()

    def names(self) -> set[str]:
        """The tensors of the file that are read for it: nobody reads them on the CPU afterwards."""
        weights = [weight for group in self._groups for weight in group.matrices.weights]
        found = {part.name for weight in weights for part in weight.parts}
        return found.union(*(up.names() for up in map(_of, self._up) if up is not None))

    def device_bytes(self, dtype: torch.dtype) -> int:
        """Of all devices together, without the kernels' workspace; what has to be floats is `dtype`."""
        packed = sum(group.matrices.num_bytes for group in self._groups)
        return packed + sum(up.device_bytes(dtype) for up in map(_of, self._up) if up is not None)

    @property
    def file_bytes(self) -> int:
        """What is read of the file."""
        read = sum(group.matrices.file_bytes for group in self._groups)
        return read + sum(up.file_bytes for up in map(_of, self._up) if up is not None)

    def load(self, dtype: torch.dtype, *, progress: bool) -> None:
        """Copy everything, with a bar in bytes; activations are of `dtype`. CapacityError where there is no room."""
        from tqdm.auto import tqdm

        self._spaces = DenseSpaces(dtype)
        bar = tqdm(
            total=self.file_bytes, desc="dense weights", unit="B", unit_scale=True, unit_divisor=1024,
            disable=not (progress and self.file_bytes and sys.stderr.isatty()),
        )  # fmt: skip
        with bar:
            try:
                for group in self._groups:
                    self._load(group, bar.update)
                for module in self._up:
                    up = _of(module)
                    assert up is not None, "chosen so"
                    up.load(device_at(module.place), dtype, module.arithmetic, self._spaces, bar.update)
                self._spaces.prepare()
            except torch.OutOfMemoryError:
                raise CapacityError(
                    f"the dense weights take {self.device_bytes(dtype) / 1e9:.2f} GB, which the accelerator has not "
                    f"free; give it fewer layers in a rule file, or a file of smaller types"
                ) from None

    def _load(self, group: _Group, told: Callable[[int], object]) -> None:
        first = group.layers[0]
        matrices = group.matrices
        matrices.load(device_at(first.place), told)
        bias = matrices.together([layer.bias for layer in group.layers])
        SharedInput(group.layers, matrices, product_of(matrices, first.arithmetic, self._spaces, bias))


def _of(module: AbsorbedMLA) -> AcceleratorUpProjections | None:
    up = module.up_projections
    return up if isinstance(up, AcceleratorUpProjections) else None


def _groups(model: nn.Module) -> Iterator[tuple[QuantizedLinear, ...]]:
    """Every layer that waits, each once, with those that are given the same input."""
    for module in model.modules():
        waiting = {
            name: child
            for name, child in module.named_children()
            if isinstance(child, QuantizedLinear) and child.waits_for_accelerator
        }
        for names in _SHARED:
            found = {name: waiting[name] for name in names if name in waiting}
            if len(found) > 1 and _are_alike(list(found.values())):
                yield tuple(found.values())
                for name in found:
                    del waiting[name]
        yield from ((child,) for child in waiting.values())


def _are_alike(layers: list[QuantizedLinear]) -> bool:
    packed = [layer.packed for layer in layers]
    orders = [weight for weight in packed if weight is None or weight.column_order is not None]
    return not orders and len({(layer.place, layer.arithmetic, layer.in_features) for layer in layers}) == 1
