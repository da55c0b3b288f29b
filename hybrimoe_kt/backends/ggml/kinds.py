"""Layers that are alike but for their weights: what one's graph computes another's does, with other addresses."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable

import numpy as np
import torch

from hybrimoe_kt.device.packed import PackedMatrix

from .parts import LayerParts

__all__ = ["LayerKind"]


class LayerKind:
    """A layer's weights in a fixed order, and a number for all else that its graph depends on."""

    def __init__(self, parts: LayerParts, kinds: dict[Hashable, int]) -> None:
        """`kinds` numbers all there are, and takes a new one."""
        self._weights: list[torch.Tensor] = []
        form = self._form(parts)
        addresses = [values.data_ptr() for values in self._weights]
        self.addresses = np.array(addresses, dtype=np.int64)
        """Of the weights."""
        whole = form, tuple(map(addresses.index, addresses))  # where two are the same, others may not be
        self.number = kinds.setdefault(whole, len(kinds))

    def find(self, values: torch.Tensor) -> tuple[int, int] | None:
        """Of which weight these are values, and how many bytes behind its beginning; None where of no weight.

        So orders are, which are part of the kind.
        """
        address = values.data_ptr()
        for number, (weight, first) in enumerate(zip(self._weights, self.addresses.tolist(), strict=True)):
            if first <= address < first + max(1, weight.nbytes):
                return number, address - first
        assert values.dtype is torch.int32, "a layer's parts have all weights"
        return None

    def _form(self, part: object) -> Hashable:
        if isinstance(part, PackedMatrix):
            self._weights.append(part.data)
            return part.ggml_type, part.rows, part.columns, part.heads
        if isinstance(part, torch.Tensor):
            if not part.is_floating_point():
                return tuple(part.flatten().tolist())  # orders, of which graphs have more than the address
            self._weights.append(part)
            return part.dtype, *part.shape
        if isinstance(part, list | tuple):
            return tuple(map(self._form, part))
        if dataclasses.is_dataclass(part):
            fields = (getattr(part, field.name) for field in dataclasses.fields(part))
            return type(part), *map(self._form, fields)
        assert isinstance(part, Hashable), f"{type(part).__name__} in a layer's parts"
        return part
