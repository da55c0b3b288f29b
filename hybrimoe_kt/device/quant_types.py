"""Names and sizes of GGUF quantisation types."""

from __future__ import annotations

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

__all__ = ["row_bytes", "type_name"]


def type_name(ggml_type: int) -> str:
    """Return "Q4_K" for 12; an id this gguf-py does not know is returned as "type 99"."""
    try:
        return GGMLQuantizationType(ggml_type).name
    except ValueError:
        return f"type {ggml_type}"


def row_bytes(ggml_type: int, num_values: int) -> int:
    """Bytes of one row of `num_values`, a multiple of the type's block."""
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(ggml_type)]
    return num_values // block * block_bytes
