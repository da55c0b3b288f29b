"""What released checkpoints hold where it is not what Transformers writes: other names, and experts in MXFP4."""

from __future__ import annotations

import re

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

_PARTS = {"minimax_m3_vl_text": "minimax_m3_vl"}
"""Parts that write -> the models whose names their files have; Transformers saves a part under names of its own."""
for part, whole in _PARTS.items():
    known = get_checkpoint_conversion_mapping(whole)
    if known is not None and get_checkpoint_conversion_mapping(part) is None:
        register_checkpoint_conversion_mapping(part, known)

__all__ = ["deepseek4_as_published", "in_mxfp4", "kimi_linear_as_published"]

_EXPERT = re.compile(r".*\.ffn\.experts\.\d+\.w[123]\.weight")


def in_mxfp4(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Neighbours in a byte `[..., columns / 2]`, an exponent for 32 of them, and the values that these say."""
    blocks = quantize(values.detach().numpy(), GGMLQuantizationType.MXFP4)
    said = torch.from_numpy(dequantize(blocks, GGMLQuantizationType.MXFP4)).view(values.shape)
    parts = torch.from_numpy(np.ascontiguousarray(blocks)).view(*values.shape[:-1], -1, 17)
    halves = torch.cat((parts[..., 1:] & 15, parts[..., 1:] >> 4), dim=-1).unflatten(-1, (-1, 2))  # in order, by twos
    numbers = halves[..., 0] | halves[..., 1] << 4
    return numbers.flatten(-2), parts[..., 0], said


def kimi_linear_as_published(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Dense layers keep their name, which Transformers takes for that of the others as it saves them."""
    dense = re.compile(r"block_sparse_moe(?=\.\w+_proj\.)")
    return {dense.sub("mlp", key): value for key, value in tensors.items()}


def deepseek4_as_published(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names that its files have, with experts packed."""
    found: dict[str, torch.Tensor] = {}
    for key, value in tensors.items():
        name = key.removeprefix("model.").replace("embed_tokens", "embed").replace("hc_head.hc_", "hc_head_")
        name = re.sub(r"\.attn\.norm\.", ".attn.kv_norm.", name)
        if _EXPERT.fullmatch(name):
            found[name], found[name.replace(".weight", ".scale")], _ = in_mxfp4(value)
        else:
            found[name] = value
    return found
