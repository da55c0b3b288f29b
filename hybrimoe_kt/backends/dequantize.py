"""GGUF blocks to float32: the one adapter around Transformers' and gguf-py's dequantisers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Container

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize as numpy_dequantize

from hybrimoe_kt.dotted import load_dotted
from hybrimoe_kt.errors import ModelError
from hybrimoe_kt.quants import TYPES, type_name

__all__ = ["dequantize", "dequantize_q5_0"]

_routine = functools.cache(load_dotted)


def dequantize(data: torch.Tensor, ggml_type: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the float32 values of `data` (uint8 `[num_bytes]`, any device), shaped `shape`.

    Transformers' torch routines where they know the type (2-10x gguf-py's, and they run on the data's own
    device), one of ours for Q5_0, which experts of odd widths have; gguf-py's NumPy ones, on the CPU, for the few
    that are left (Q5_1, MXFP4).
    """
    kind = TYPES[ggml_type]
    if kind.dtype:
        floats: torch.Tensor = data.view(getattr(torch, kind.dtype))
        return floats.to(torch.float32).reshape(shape)
    if kind.dequantize:
        own: torch.Tensor = _routine(kind.dequantize)(data.reshape(-1, kind.block_bytes))
        return own.reshape(shape)
    known, torch_dequantize = _torch_routines()
    if ggml_type in known:
        values: torch.Tensor = torch_dequantize(data, ggml_type, torch.float32)
        return values.reshape(shape)
    return _dequantize_numpy(data, ggml_type).reshape(shape)


def dequantize_q5_0(blocks: torch.Tensor) -> torch.Tensor:
    """Blocks of 22 bytes: a half `d`, 32 fifth bits, 16 low then 16 high nibbles; a value is `d * (q - 16)`."""
    scale = blocks[:, :2].contiguous().view(torch.float16).to(torch.float32)  # [num_blocks, 1]
    fifth = blocks[:, 2:6].contiguous().view(torch.int32) >> torch.arange(32, dtype=torch.int32, device=blocks.device)
    nibbles = torch.cat((blocks[:, 6:] & 0xF, blocks[:, 6:] >> 4), dim=1).to(torch.int32)
    return scale * ((nibbles | (fifth & 1) << 4) - 16)


@functools.cache
def _torch_routines() -> tuple[Container[int], Callable[..., torch.Tensor]]:
    """The types that Transformers dequantises, and its function; none in versions before 5, which lack it."""
    try:
        from transformers.integrations.gguf.dequant import GGML_BLOCK
        from transformers.integrations.gguf.dequant import dequantize as torch_dequantize
    except ImportError:
        return (), _dequantize_numpy
    return GGML_BLOCK, torch_dequantize


def _dequantize_numpy(data: torch.Tensor, ggml_type: int) -> torch.Tensor:
    try:
        values = numpy_dequantize(data.cpu().numpy(), GGMLQuantizationType(ggml_type))
    except (NotImplementedError, ValueError):
        raise ModelError(f"weights of {type_name(ggml_type)} cannot be dequantised by this version of gguf") from None
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).to(data.device)
