"""Who attends for a prompt's tokens on a CUDA device: each to itself and all before it, which no mask need say.

Torch's kernels for that take no mask, and a prompt's later chunks have one; with it they go to kernels that read it,
number by number. FlashInfer takes what is held as it is, and latents as well.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from typing import Any, Protocol

import torch
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

from hybrimoe_kt.errors import summary

from .flashinfer_attention import FlashInferAttention, workspace
from .sdpa_attention import Asked, read_latents

__all__ = ["FlashInferPrompts", "PromptAttention", "PromptReader", "TorchPrompts", "prompts_on"]

logger = logging.getLogger(__name__)

_WITHIN = 5e-2
"""Of the answer's norm, in half precision; as `decode_attention` has it."""
_TRIED = 5, 83
"""Tokens of a trial, and how many are held with them."""


class PromptReader(Protocol):
    """One way of attending: queries `[1, heads, tokens, width]` to `[1, kv_heads, length, width]`, theirs the last."""

    name: str

    def refuses(self, query: torch.Tensor, first: torch.Tensor, second: torch.Tensor, asked: Asked) -> str | None:
        """Why it does not attend with such a query to two such parts, None if it does."""

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float, window: int
    ) -> torch.Tensor:
        """Grouped queries; the last `window` tokens are seen, 0: all. The answer is of the query's shape."""

    def attend_latents(
        self,
        query: torch.Tensor,
        rotated_query: torch.Tensor,
        latents: torch.Tensor,
        rotated: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """Latents `[1, 1, length, rank]`, which are values, too, and `[1, 1, length, rope]`; as `query` is."""


class FlashInferPrompts:
    """Read in flashinfer-python 0.7.2.post1, and never run here, see `flashinfer_attention`."""

    name = "flashinfer"

    def __init__(self, device: torch.device) -> None:
        self._decode = FlashInferAttention(device)
        self._latent: Any = None

    def refuses(self, query: torch.Tensor, first: torch.Tensor, second: torch.Tensor, asked: Asked) -> str | None:
        return self._decode.refuses(query, first, second, asked)

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float, window: int
    ) -> torch.Tensor:
        import flashinfer

        answer: torch.Tensor = flashinfer.single_prefill_with_kv_cache(
            query[0].transpose(0, 1), keys[0], values[0], causal=True, kv_layout="HND", sm_scale=scaling,
            window_left=window - 1,
        )  # fmt: skip
        return answer.transpose(0, 1)[None]

    def attend_latents(
        self,
        query: torch.Tensor,
        rotated_query: torch.Tensor,
        latents: torch.Tensor,
        rotated: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """Planned anew for every layer and chunk, with pages of one token."""
        from flashinfer.mla import BatchMLAPagedAttentionWrapper, MLAPlanMetadata

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
            sm_scale=scaling,
            q_data_type=query.dtype,
            kv_data_type=latents.dtype,
            query_layout="split",
            kv_cache_layout="split",
        )
        queries = (part[0].transpose(0, 1).contiguous() for part in (query, rotated_query))
        kept = latents[0].transpose(0, 1), rotated[0].transpose(0, 1)
        answer: torch.Tensor = self._latent.run(query=tuple(queries), kv_cache=kept)
        return answer.transpose(0, 1)[None]


class TorchPrompts:
    """Torch's fused attention, told that the mask is causal in the lower right corner."""

    name = "torch"

    def refuses(self, query: torch.Tensor, first: torch.Tensor, second: torch.Tensor, asked: Asked) -> str | None:
        if asked.is_latent or asked.has_sinks or asked.window:
            return "torch has no kernel for latents, sinks or windows without a mask"
        if not query.dtype == first.dtype == second.dtype or query.shape[-1] != second.shape[-1]:
            return "torch takes queries, keys and values of one dtype and width"
        return None

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float, window: int
    ) -> torch.Tensor:
        seen: Any = causal_lower_right(query.shape[2], keys.shape[2])
        is_grouped = query.shape[1] != keys.shape[1]
        return functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=seen, scale=scaling, enable_gqa=is_grouped
        )

    def attend_latents(self, *_: Any) -> torch.Tensor:
        raise NotImplementedError("refused")


class PromptAttention:
    """Of one device: finds for each shape who attends, once, by trying; None where the model's own code should."""

    def __init__(self, device: torch.device, readers: list[PromptReader]) -> None:
        self._device, self._readers = device, readers
        self._found: dict[tuple[object, ...], PromptReader | None] = {}

    def reader(
        self, query: torch.Tensor, first: torch.Tensor, second: torch.Tensor, asked: Asked
    ) -> PromptReader | None:
        """Who attends with such a query to two such parts, keys and values or latents and what is rotated."""
        key = asked, *((part.dtype, part.shape[1], part.shape[-1]) for part in (query, first, second))
        if key not in self._found:
            self._found[key] = self._choose(query, first, second, asked)
        return self._found[key]

    def _choose(
        self, query: torch.Tensor, first: torch.Tensor, second: torch.Tensor, asked: Asked
    ) -> PromptReader | None:
        for reader in self._readers:
            if reader.refuses(query, first, second, asked) is None:
                problem = _problem(reader, query, first, second, asked)
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
        readers.append(FlashInferPrompts(device))
    if kernel in ("auto", "sdpa"):
        readers.append(TorchPrompts())
    return PromptAttention(device, readers)


def _problem(
    reader: PromptReader, query: torch.Tensor, first: torch.Tensor, second: torch.Tensor, asked: Asked
) -> str | None:
    """What is wrong with its answer for a few tokens of the same heads, None if nothing is."""
    generator, (tokens, length) = torch.Generator(device="cpu").manual_seed(20250614), _TRIED

    def like(part: torch.Tensor, count: int, width: int | None = None) -> torch.Tensor:
        shape = 1, part.shape[1], count, width or part.shape[-1]
        return torch.randn(shape, generator=generator, device="cpu").to(part.dtype)

    queries = [like(query, tokens)]
    if asked.is_latent:
        queries.append(like(query, tokens, second.shape[-1]))
    parts = [like(first, length), like(second, length)]
    scaling = sum(part.shape[-1] for part in queries) ** -0.5
    wanted = _plainly(queries, parts, scaling, asked)
    device = query.device
    try:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            given = [part.to(device) for part in (*queries, *parts)]
            if asked.is_latent:
                found = reader.attend_latents(given[0], given[1], given[2], given[3], scaling)
            else:
                found = reader.attend(given[0], given[1], given[2], scaling, asked.window)
            off = float((found.cpu().float() - wanted).norm() / wanted.norm())
    except Exception as error:  # whatever a compiler or driver may raise
        return summary(error)
    return None if off <= _WITHIN else f"its answer for a few tokens is {off:.0%} off"


def _plainly(queries: list[torch.Tensor], parts: list[torch.Tensor], scaling: float, asked: Asked) -> torch.Tensor:
    """The same by torch on the CPU, in single precision, with a mask."""
    (query, *rotated_query), (first, second) = ([part.float() for part in given] for given in (queries, parts))
    tokens, length = query.shape[2], first.shape[2]
    place = torch.arange(length, device="cpu") - torch.arange(length - tokens, length, device="cpu")[:, None]
    seen = (place <= 0) & (place > -asked.window if asked.window else True)
    if asked.is_latent:
        return read_latents(query, rotated_query[0], first[:, 0], second[:, 0], seen, scaling)
    return functional.scaled_dot_product_attention(query, first, second, attn_mask=seen, scale=scaling, enable_gqa=True)
