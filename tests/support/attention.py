"""What attention of one token should answer, and who answers; for tests."""

from __future__ import annotations

import torch

from hybrimoe_kt.backends.attention_protocol import Asked
from hybrimoe_kt.backends.decode_attention import DeviceAttention
from hybrimoe_kt.kernels.decode_attention.naive import naive_decode_attention
from hybrimoe_kt.kernels.latent_attention.naive import naive_latent_attention

__all__ = ["chosen", "naive"]


def naive(asked: Asked) -> torch.Tensor:
    """The answer `[1, heads, 1, width]` in float32, whatever is kept in what."""
    query, held = asked.query[0, :, 0], int(asked.length)
    if asked.rotated_query is not None:
        rotated_query = asked.rotated_query[0, :, 0]
        answer = naive_latent_attention(query, rotated_query, asked.keys[0, 0], asked.values[0, 0], held, asked.scaling)
    else:
        answer = naive_decode_attention(
            query, asked.keys[0], asked.values[0], held, asked.scaling, asked.window, asked.sinks
        )
    return answer[None, :, None]


def chosen(by: DeviceAttention) -> list[str]:
    """Whom the shapes so far were given to."""
    return sorted({attention.name for attention in by._chosen.values()})
