"""Attention of one token by torch, to as many tokens as stand in a tensor on the device."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from hybrimoe_kt.device import step_graph

from .attention_protocol import Asked

__all__ = ["SdpaAttention", "read_latents"]

_WIDEST_SHARED = 256
"""Widths up to which torch shares keys and values among query heads, as Transformers asks it."""


class SdpaAttention:
    """On a CPU the length is read and nothing behind it: Transformers' own answer for a cache of this length.

    On other devices nobody may wait, so all of the room is attended to, behind a mask: its numbers must be finite.
    """

    name = "sdpa"

    def __init__(self, device: torch.device) -> None:
        self._reads_length = device.type == "cpu"

    def refuses(self, asked: Asked) -> str | None:
        return None

    def plan(self, length: int) -> None:
        """Nothing: lengths are read where they are."""

    def attend(self, asked: Asked) -> torch.Tensor:
        query, keys, values = asked.query, asked.keys, asked.values
        if not self._reads_length:
            seen = _seen(keys, asked.length, asked.window)[None, None, None]
            return _answer(asked, keys.to(query.dtype), values.to(query.dtype), seen)
        out = query.new_empty(*query.shape[:3], (keys if asked.is_latent else values).shape[-1])

        def work() -> None:
            held = int(asked.length)
            seen = slice(max(0, held - asked.window) if asked.window else 0, held)
            part, values_part = (room[:, :, seen].to(query.dtype) for room in (keys, values))
            out.copy_(_answer(asked, part, values_part, None))

        step_graph.opaque(work)
        return out


def _answer(asked: Asked, keys: torch.Tensor, values: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
    """To `keys` and `values` in place of the rooms, all of them or those that are `seen [1, 1, 1, capacity]`."""
    if asked.rotated_query is not None:
        return read_latents(asked.query, asked.rotated_query, keys[:, 0], values[:, 0], seen, asked.scaling)
    return _attend(asked.query, keys, values, asked.scaling, asked.sinks, seen)


def read_latents(
    query: torch.Tensor,
    rotated_query: torch.Tensor,
    latents: torch.Tensor,
    rotated: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """Return what queries `[batch, heads, tokens, rank]` and `[..., rope]` read of latents `[batch, length, rank]`.

    `rotated [batch, length, rope]`; `mask` bool, or float to be added, `[batch, 1, tokens, length or more]`. Latents
    are alike for all heads: as rows of one product they are read once, never copied for each head.
    """
    batch, heads, tokens, _ = query.shape
    together = (batch, heads * tokens, -1)
    scores = query.reshape(together) @ latents.mT + rotated_query.reshape(together) @ rotated.mT
    scores = scores.view(batch, heads, tokens, -1) * scaling
    if mask is not None:
        mask = mask[..., : scores.shape[-1]]
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    probabilities = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return (probabilities.view(together) @ latents).view(batch, heads, tokens, -1)


def _seen(room: torch.Tensor, length: torch.Tensor, window: int) -> torch.Tensor:
    """Bool `[capacity]`: what the last token sees."""
    place = torch.arange(room.shape[2], device=room.device)
    seen = place < length
    return seen & (place >= length - window) if window else seen


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
    sinks: torch.Tensor | None,
    seen: torch.Tensor | None,
) -> torch.Tensor:
    """Heads that share keys stand as tokens beside each other where torch would repeat the keys for them."""
    batch, heads, _, _ = query.shape
    groups = heads // keys.shape[1]
    shares = seen is None and groups > 1 and keys.shape[-1] == values.shape[-1] <= _WIDEST_SHARED
    packed = query if shares or groups == 1 else query.reshape(batch, keys.shape[1], groups, -1)
    if sinks is not None:
        packed = query.reshape(batch, keys.shape[1], groups, -1)
        answer = _with_sinks(packed, keys, values, scaling, sinks.view(1, keys.shape[1], groups, 1), seen)
    elif shares:
        answer = functional.scaled_dot_product_attention(query, keys, values, scale=scaling, enable_gqa=True)
    else:
        answer = functional.scaled_dot_product_attention(packed, keys, values, attn_mask=seen, scale=scaling)
    return answer.reshape(batch, heads, 1, -1)


def _with_sinks(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
    sinks: torch.Tensor,
    seen: torch.Tensor | None,
) -> torch.Tensor:
    scores = (query @ keys.mT).float() * scaling
    if seen is not None:
        scores = scores.masked_fill(~seen, -math.inf)
    scores = torch.cat((scores, sinks.float().expand(*scores.shape[:3], 1)), dim=-1)
    return scores.softmax(-1)[..., :-1].to(values.dtype) @ values
