"""Attention of one token by torch, to as many tokens as stand in a tensor on the device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional

from hybrimoe_kt.device import step_graph

__all__ = ["Asked", "SdpaAttention", "read_latents"]

_WIDEST_SHARED = 256
"""Widths up to which torch shares keys and values among query heads, as Transformers asks it."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What attention is to do beside reading keys and values."""

    is_latent: bool = False
    """Two rooms are latents `[1, 1, capacity, rank]` and their rotated part, not keys and values."""
    window: int = 0
    """Tokens that are seen, 0: all."""
    has_sinks: bool = False


class SdpaAttention:
    """On a CPU the length is read and nothing behind it: Transformers' own answer for a cache of this length.

    On other devices nobody may wait, so all of the room is attended to, behind a mask: its numbers must be finite.
    """

    name = "sdpa"

    def __init__(self, device: torch.device) -> None:
        self._reads_length = device.type == "cpu"

    def refuses(self, query: torch.Tensor, first: torch.Tensor, second: torch.Tensor, asked: Asked) -> str | None:
        return None

    def plan(self, length: int) -> None:
        """Nothing: lengths are read where they are."""

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        length: torch.Tensor,
        scaling: float,
        *,
        window: int = 0,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if not self._reads_length:
            seen = _seen(keys, length, window)
            return _attend(query, keys.to(query.dtype), values.to(query.dtype), scaling, sinks, seen[:, None, None])
        out = query.new_empty(*query.shape[:3], values.shape[-1])

        def work() -> None:
            held = int(length)
            seen = slice(max(0, held - window) if window else 0, held)
            part, values_part = (room[:, :, seen].to(query.dtype) for room in (keys, values))
            out.copy_(_attend(query, part, values_part, scaling, sinks, None))

        step_graph.opaque(work)
        return out

    def attend_latents(
        self,
        query: torch.Tensor,
        rotated_query: torch.Tensor,
        latents: torch.Tensor,
        rotated: torch.Tensor,
        length: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        if not self._reads_length:
            rooms = latents[:, 0].to(query.dtype), rotated[:, 0].to(query.dtype)
            return read_latents(query, rotated_query, *rooms, _seen(latents, length, 0)[:, None, None], scaling)
        out = torch.empty_like(query)

        def work() -> None:
            held = int(length)
            part, rotated_part = (room[:, 0, :held].to(query.dtype) for room in (latents, rotated))
            out.copy_(read_latents(query, rotated_query, part, rotated_part, None, scaling))

        step_graph.opaque(work)
        return out


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
    """Bool `[1, capacity]`: what the last token sees."""
    place = torch.arange(room.shape[2], device=room.device)
    seen = place < length
    return (seen & (place >= length - window) if window else seen)[None]


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
