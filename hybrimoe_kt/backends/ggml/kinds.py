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
        self.number_of = {address: number for number, address in reversed(list(enumerate(addresses)))}
        """Address -> the first weight that is there; that some are the same ones is part of the form."""
        whole = form, tuple(map(self.number_of.__getitem__, addresses))
        self.number = kinds.setdefault(whole, len(kinds))

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
