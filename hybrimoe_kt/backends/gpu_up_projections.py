"""The up-projections of latent attention on an accelerator, head by head, packed as the file has them.

A file that has them as two tensors has the keys' transposed, as absorbed attention wants them, and both stay blocks. In
one tensor blocks run along the rank, which the keys' product sums over the other way: that half is kept in the model's
dtype, 16 bits a value, and the values' half as it is. Rounding it to blocks anew would change the model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from hybrimoe_kt.device.dense_matrices import DenseMatrices
from hybrimoe_kt.device.packed import PackedMatrix, PackedWeight

from .dequantize import dequantize
from .gpu_dense import DenseProduct, DenseSpaces, product_of, refusal

__all__ = ["AcceleratorUpProjections"]


class AcceleratorUpProjections:
    """Of all heads of one layer; nothing is allocated or read before `load`. An `UpProjections`."""

    def __init__(self, heads: int, keys: PackedMatrix, values: PackedWeight, num_keys: int = 0) -> None:
        """`keys` `[heads, rank, nope]`; or, with `num_keys` rows a head of them, keys and values in one."""
        self._heads, self._num_keys, self._keys = heads, num_keys, keys
        self._values = DenseMatrices((values,))
        self._packed_keys = None if num_keys else DenseMatrices((PackedWeight((_flat(keys),)),))
        self._float_keys = torch.empty(0)
        self._to_latent: DenseProduct | None = None
        self._to_values: DenseProduct | None = None

    @classmethod
    def split(cls, keys: PackedMatrix, values: PackedMatrix) -> AcceleratorUpProjections:
        """Of two tensors, `[heads, rank, nope]` and `[heads, value, rank]`."""
        return cls(keys.heads, keys, PackedWeight((_flat(values),)))

    @classmethod
    def fused(cls, both: PackedMatrix, heads: int, nope: int, value: int) -> AcceleratorUpProjections:
        """Of one tensor, `[heads * (nope + value), rank]`."""
        rows = torch.arange(heads * (nope + value), device="cpu").view(heads, nope + value)[:, nope:]
        return cls(heads, both, PackedWeight((both,), row_order=rows.flatten()), nope)

    def refusal(self, arithmetic: str) -> str | None:
        """Return why they have to be floats on the device, None where they can stay."""
        weights = [weight for matrices in self._matrices for weight in matrices.weights]
        return next((reason for weight in weights if (reason := refusal(weight, arithmetic))), None)

    @property
    def _matrices(self) -> tuple[DenseMatrices, ...]:
        return (self._values,) if self._packed_keys is None else (self._packed_keys, self._values)

    def names(self) -> set[str]:
        """The tensors of the file that they are made of."""
        return {self._keys.name, *(part.name for weight in self._values.weights for part in weight.parts)}

    @property
    def file_bytes(self) -> int:
        """What is read of the file."""
        return sum(matrices.file_bytes for matrices in self._matrices) + (self._keys_bytes().numel())

    def device_bytes(self, dtype: torch.dtype) -> int:
        """What they take on the device, floats of `dtype`."""
        packed = sum(matrices.num_bytes for matrices in self._matrices)
        return packed + self._heads * self._num_keys * self._keys.columns * dtype.itemsize

    def load(
        self,
        device: torch.device,
        dtype: torch.dtype,
        arithmetic: str,
        spaces: DenseSpaces,
        told: Callable[[int], object] = lambda num_bytes: None,
    ) -> None:
        """Copy everything to `device`; floats become `dtype`. `told` hears of bytes of the file as they are done."""
        for matrices in self._matrices:
            matrices.load(device, told)
        self._to_values = product_of(self._values, arithmetic, spaces, heads=self._heads)
        if self._packed_keys is not None:
            self._to_latent = product_of(self._packed_keys, arithmetic, spaces, heads=self._heads)
            return
        shape = self._heads, self._num_keys, self._keys.columns
        self._float_keys = torch.empty(shape, dtype=dtype, device=device)
        for into, data in zip(self._float_keys, self._keys_bytes(), strict=True):
            into.copy_(dequantize(data.flatten().to(device), self._keys.ggml_type, shape[1:]))
            told(data.numel())

    def _keys_bytes(self) -> torch.Tensor:
        """Of keys that become floats, `[heads, num_keys, row_bytes]`."""
        if not self._num_keys:
            return torch.empty(0, device="cpu")
        return self._keys.data.view(self._heads, self._keys.rows // self._heads, -1)[:, : self._num_keys]

    def to_latent(self, query: torch.Tensor) -> torch.Tensor:
        """`[batch, heads, tokens, nope]` -> `[batch, heads, tokens, rank]`."""
        if self._to_latent is None:
            return query @ self._float_keys.to(query.dtype)
        return self._by_head(self._to_latent, query)

    def to_values(self, latent: torch.Tensor) -> torch.Tensor:
        """`[batch, heads, tokens, rank]` -> `[batch, heads, tokens, value]`."""
        assert self._to_values is not None, "used before it was loaded"
        return self._by_head(self._to_values, latent)

    def _by_head(self, product: DenseProduct, given: torch.Tensor) -> torch.Tensor:
        batch, heads, tokens, columns = given.shape
        rows = given.transpose(1, 2).reshape(batch * tokens, heads, columns)
        return product(rows).view(batch, tokens, heads, -1).transpose(1, 2)


def _flat(matrix: PackedMatrix) -> PackedMatrix:
    """All heads' rows one after the other."""
    return PackedMatrix(matrix.name, matrix.data, matrix.ggml_type, matrix.heads * matrix.rows, matrix.columns)
