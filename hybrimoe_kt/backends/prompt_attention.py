"""Who attends for a prompt's tokens on a CUDA device: each to itself and all before it, which no mask need say.

Torch's kernels for that take no mask, and a prompt's later chunks have one; with it they go to kernels that read it,
number by number. FlashInfer takes what is held as it is, and latents as well.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

from hybrimoe_kt.errors import summary

from .attention_protocol import AskedPrompt, PromptReader
from .flashinfer_attention import FlashInferAttention, refusal, workspace
from .sdpa_attention import read_latents

__all__ = ["FlashInferPrompts", "PromptAttention", "TorchPrompts", "prompts_on"]

logger = logging.getLogger(__name__)

_WITHIN = 5e-2
"""Of the answer's norm, in half precision; as `decode_attention` has it."""
_TRIED = 5, 83
"""Tokens of a trial, and how many are held with them."""


class FlashInferPrompts:
    """Read in flashinfer-python 0.7.2.post1, and never run here, see `flashinfer_attention`."""

    name = "flashinfer"

    def __init__(self) -> None:
        self._latent: Any = None

    def refuses(self, asked: AskedPrompt) -> str | None:
        return refusal(asked)

    def attend(self, asked: AskedPrompt) -> torch.Tensor:
        if asked.rotated_query is not None:
            return self._attend_latents(asked, asked.rotated_query)
        import flashinfer

        answer: torch.Tensor = flashinfer.single_prefill_with_kv_cache(
            asked.query[0].transpose(0, 1),
            asked.keys[0],
            asked.values[0],
            causal=True,
            kv_layout="HND",
            sm_scale=asked.scaling,
            window_left=asked.window - 1,
        )
        return answer.transpose(0, 1)[None]

    def _attend_latents(self, asked: AskedPrompt, rotated_query: torch.Tensor) -> torch.Tensor:
        """Planned anew for every layer and chunk, with pages of one token."""
        from flashinfer.mla import BatchMLAPagedAttentionWrapper, MLAPlanMetadata

        query, latents, rotated = asked.query, asked.keys, asked.values
        (_, heads, tokens, rank), length = query.shape, latents.shape[2]
        if self._latent is None:
            self._latent = BatchMLAPagedAttentionWrapper(workspace(query.device))
        ends = [torch.tensor(pair, dtype=torch.int32, device="cpu") for pair in ((0, tokens), (0, length), (length,))]
        pages = torch.arange(length, dtype=torch.int32, device=query.device)
        self._latent.plan(
            metadata=MLAPlanMetadata.csr(ends[0], ends[1], pages, ends[2]),
            num_heads=heads,
            head_dim_ckv=rank,
            head_dim_kpe=rotated.shape[-1],
            page_size=1,
            causal=True,
            sm_scale=asked.scaling,
            q_data_type=query.dtype,
            kv_data_type=latents.dtype,
            query_layout="split",
            kv_cache_layout="split",
        )
        queries = tuple(part[0].transpose(0, 1).contiguous() for part in (query, rotated_query))
        kept = latents[0].transpose(0, 1), rotated[0].transpose(0, 1)
        answer: torch.Tensor = self._latent.run(query=queries, kv_cache=kept)
        return answer.transpose(0, 1)[None]


class TorchPrompts:
    """Torch's fused attention, told that the mask is causal in the lower right corner."""

    name = "torch"

    def refuses(self, asked: AskedPrompt) -> str | None:
        query, keys, values = asked.query, asked.keys, asked.values
        if asked.is_latent or asked.sinks is not None or asked.window:
            return "torch has no kernel for latents, sinks or windows without a mask"
        if not query.dtype == keys.dtype == values.dtype or query.shape[-1] != values.shape[-1]:
            return "torch takes queries, keys and values of one dtype and width"
        return None

    def attend(self, asked: AskedPrompt) -> torch.Tensor:
        query, keys = asked.query, asked.keys
        seen: Any = causal_lower_right(query.shape[2], keys.shape[2])
        is_grouped = query.shape[1] != keys.shape[1]
        return functional.scaled_dot_product_attention(
            query, keys, asked.values, attn_mask=seen, scale=asked.scaling, enable_gqa=is_grouped
        )


class PromptAttention:
    """Of one device: finds for each shape who attends, once, by trying; None where the model's own code should."""

    def __init__(self, device: torch.device, readers: list[PromptReader]) -> None:
        self._device, self._readers = device, readers
        self._found: dict[tuple[object, ...], PromptReader | None] = {}

    def attend(self, asked: AskedPrompt) -> torch.Tensor | None:
        """As of `PromptReader`; None where nobody does."""
        parts = asked.query, asked.keys, asked.values
        forms = ((part.dtype, part.shape[1], part.shape[-1]) for part in parts)
        key = asked.is_latent, asked.window, asked.sinks is None, *forms
        if key not in self._found:
            self._found[key] = self._choose(asked)
        reader = self._found[key]
        return None if reader is None else reader.attend(asked)

    def _choose(self, asked: AskedPrompt) -> PromptReader | None:
        for reader in self._readers:
            if reader.refuses(asked) is None:
                problem = _problem(reader, asked)
                if problem is None:
                    return reader
                logger.warning("%s does not attend to prompts on %s: %s", reader.name, self._device, problem)
        return None


@functools.cache
def prompts_on(device: torch.device, kernel: str) -> PromptAttention | None:
    """The one of a device that layers share, of those that `kernel` of `DecodeAttention` allows; None: nobody."""
    if device.type != "cuda":
        return None
    readers: list[PromptReader] = []
    if kernel in ("auto", "flashinfer") and FlashInferAttention.unusable(device) is None:
        readers.append(FlashInferPrompts())
    if kernel in ("auto", "sdpa"):
        readers.append(TorchPrompts())
    return PromptAttention(device, readers)


def _problem(reader: PromptReader, asked: AskedPrompt) -> str | None:
    """What is wrong with its answer for a few tokens of the same heads, None if nothing is."""
    generator, (tokens, length) = torch.Generator(device="cpu").manual_seed(20250614), _TRIED

    def like(part: torch.Tensor, count: int) -> torch.Tensor:
        shape = 1, part.shape[1], count, part.shape[-1]
        return torch.randn(shape, generator=generator, device="cpu").to(part.dtype)

    given: dict[str, Any] = {"query": like(asked.query, tokens)}
    given |= {"keys": like(asked.keys, length), "values": like(asked.values, length)}
    width = asked.query.shape[-1]
    if asked.rotated_query is not None:
        given["rotated_query"] = like(asked.rotated_query, tokens)
        width += asked.rotated_query.shape[-1]
    few, device = replace(asked, scaling=width**-0.5, **given), asked.query.device
    wanted = _plainly(few)
    try:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            there = {name: part.to(device) for name, part in given.items()}
            found = reader.attend(replace(few, **there)).cpu().float()
        off = float((found - wanted).norm() / wanted.norm())
    except Exception as error:  # whatever a compiler or driver may raise
        return summary(error)
    return None if off <= _WITHIN else f"its answer for a few tokens is {off:.0%} off"


def _plainly(asked: AskedPrompt) -> torch.Tensor:
    """The same by torch on the CPU, in single precision, with a mask."""
    query, keys, values = (part.float() for part in (asked.query, asked.keys, asked.values))
    tokens, length = query.shape[2], keys.shape[2]
    behind = torch.arange(length, device="cpu") - torch.arange(length - tokens, length, device="cpu")[:, None]
    seen = (behind <= 0) & (behind > -(asked.window or length))
    if asked.rotated_query is not None:
        return read_latents(query, asked.rotated_query.float(), keys[:, 0], values[:, 0], seen, asked.scaling)
    return functional.scaled_dot_product_attention(
        query, keys, values, attn_mask=seen, scale=asked.scaling, enable_gqa=True
    )
