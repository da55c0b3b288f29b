"""Random quantised matrices, also of types that gguf-py cannot make."""

from __future__ import annotations

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import quantize

__all__ = ["KINDS", "PUBLISHED", "Type", "random_blocks"]

Type = GGMLQuantizationType
PUBLISHED = [
    Type[name]
    for name in (
        "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL",
        "IQ4_XS", "MXFP4", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS",
    )
]  # fmt: skip
"""What published files hold."""
KINDS = [*PUBLISHED, *(Type[name] for name in ("F32", "IQ1_S", "IQ1_M", "TQ1_0", "TQ2_0"))]
"""And what else can be dequantised."""
MOST_ROWS = 16384
"""Quantised in Python, at some ten million values a second."""

# Where a block keeps its half-precision scales, and how far its values spread at a scale of 1, its other bits drawn.
_DRAWN: dict[Type, tuple[tuple[int, float], ...]] = {
    Type.Q4_K: ((0, 1 / 235), (2, 7.5 / 235)),
    Type.Q5_K: ((0, 1 / 470), (2, 15.5 / 470)),
    Type.Q6_K: ((208, 1 / 1369),),
    Type.IQ3_S: ((0, 1 / 140),),
    Type.IQ3_XXS: ((0, 1 / 142),),
    Type.IQ2_S: ((0, 1 / 56),),
    Type.IQ2_XS: ((0, 1 / 56),),
    Type.IQ2_XXS: ((0, 1 / 53),),
    Type.IQ1_S: ((0, 1 / 7.2),),
    Type.IQ1_M: ((48, 1 / 7.2),),
}


def random_blocks(random: np.random.Generator, kind: Type, rows: int, columns: int) -> np.ndarray:
    """Return `[rows, row_bytes]` of `kind` whose values are zero-centred with a spread of `columns ** -0.5`.

    K-quants of the large models that are generated are drawn as bytes, and what ggml first prepares seconds for; the
    rest are quantised normals, in large matrices each row one of `MOST_ROWS`, of gguf-py where it can, else of ggml.
    """
    spread = columns**-0.5
    if kind not in _DRAWN:
        drawn = spread * random.standard_normal((min(rows, MOST_ROWS), columns), dtype=np.float32)
        try:
            raw = np.ascontiguousarray(quantize(drawn, kind)).view(np.uint8).reshape(len(drawn), -1)
        except NotImplementedError:
            raw = _quantized_by_ggml(drawn, kind)
        return raw if rows <= MOST_ROWS else raw[random.integers(0, MOST_ROWS, rows)]
    block, block_bytes = GGML_QUANT_SIZES[kind]
    raw = random.integers(0, 256, (rows * columns // block, block_bytes), dtype=np.uint8)
    for offset, unit in _DRAWN[kind]:
        scale = np.full(1, spread * unit, np.float16)
        if kind == Type.IQ1_M:  # four bits of it in each of four numbers
            quarters = raw[:, offset : offset + 8].view(np.uint16)
            quarters[:] = quarters & 0x0FFF | (scale.view(np.uint16) >> np.array([0, 4, 8, 12], np.uint16)) << 12
        else:
            raw[:, offset : offset + 2] = scale.view(np.uint8)
    return raw.reshape(rows, -1)


def _quantized_by_ggml(values: np.ndarray, kind: Type) -> np.ndarray:
    from hybrimoe_kt.backends.ggml.library import library

    rows, columns = values.shape
    block, block_bytes = GGML_QUANT_SIZES[kind]
    raw = np.empty((rows, columns // block * block_bytes), np.uint8)
    alike = np.ones(columns, np.float32)  # every column matters as much
    made = library().ggml_quantize_chunk(
        int(kind), values.ctypes.data, raw.ctypes.data, 0, rows, columns, alike.ctypes.data
    )
    assert made == raw.nbytes, kind
    return raw
