"""What types with code words look up: one tensor of bytes on every device, that all kernels are given.

A code word stands for four or eight values: their magnitudes as int8, side by side, so that one load of a word or a
pair of words brings all of them.
"""

from __future__ import annotations

import functools
from itertools import accumulate

import torch

__all__ = ["GRIDS", "OFFSETS", "code_words"]

GRIDS = {
    "IQ3_XXS": (256, 4),
    "IQ3_S": (512, 4),
    "IQ2_XXS": (256, 8),
    "IQ2_XS": (512, 8),
    "IQ2_S": (1024, 8),
}
"""Type -> how many code words it has, of how many values."""

OFFSETS = dict(zip(GRIDS, accumulate((words * values for words, values in GRIDS.values()), initial=0), strict=False))
"""Where each type's table begins, bytes; multiples of 128."""


@functools.cache
def code_words(device: torch.device) -> torch.Tensor:
    """The tables of all types one after the other, uint8, on `device`; 17 KB, taken from gguf-py."""
    from gguf import quants

    tables = []
    for name, shape in GRIDS.items():
        kind = getattr(quants, name)
        kind.init_grid()
        tables.append(torch.from_numpy(kind.grid.reshape(shape)).to(torch.uint8).flatten())
    return torch.cat(tables).to(device)
