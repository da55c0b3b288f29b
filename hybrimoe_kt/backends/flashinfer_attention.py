"""Attention of one token by FlashInfer, whose wrappers plan a length on the host and can then be replayed.

Read in flashinfer-python 0.7.2.post1, and never run here: it wants a GPU, and a compiler for its kernels. A room
`[1, kv_heads, capacity, width]` is given as pages of a few tokens, by its strides, in the order that FlashInfer calls
HND. With `use_cuda_graph` its plans always split the tokens, so that a replay launches what was captured.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from hybrimoe_kt.errors import KernelError

from .attention_protocol import Asked, AskedPrompt

__all__ = ["FlashInferAttention", "refusal", "workspace"]

_WORKSPACE_BYTES = 128 << 20
"""As its documentation recommends; for partial answers, of all wrappers of a device."""
_WRAPPER_BYTES = 8 << 20
"""What each allocates for its plans, on the device and page-locked."""
_PROMPT_BYTES = 32 << 20
"""What its prefill takes for a call, see `prompt_attention`; and one more wrapper for prompts of latents."""
_PAGE_TOKENS = 16
_WIDTHS = (64, 128, 256)
_LATENT = 512, 64
"""Rank and rotated width that its latent kernels are written for: DeepSeek's."""


@dataclass(frozen=True, slots=True)
class _Planned:
    """A wrapper for layers of one shape: `plan(length)` on the host, then any number of `run(...)`."""

    plan: Callable[[int], None]
    run: Callable[..., torch.Tensor]


class FlashInferAttention:
    """On one CUDA device; `plan` comes before every step. Calls must be on one stream, captured ones of one loop."""

    name = "flashinfer"
    num_bytes: ClassVar[int] = _WORKSPACE_BYTES + 2 * _WRAPPER_BYTES + _PROMPT_BYTES
    """What it takes of a device, where layers are of one shape."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._length = 0
        self._planned: dict[tuple[object, ...], dict[int, _Planned]] = {}
        """For layers of a shape: by the capacity of their rooms."""

    @staticmethod
    def unusable(device: torch.device) -> str | None:
        """Why it cannot run on `device`, None when it can."""
        if device.type != "cuda" or torch.version.hip:
            return f"FlashInfer has kernels for CUDA, not for {'HIP' if device.type == 'cuda' else device.type}"
        if not torch.cuda.is_available():
            return "torch finds no such device"
        if importlib.util.find_spec("flashinfer") is None:
            return "FlashInfer is not installed (pip install hybrimoe_kt[flashinfer])"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "FlashInfer's kernels want compute capability 8.0 or newer"
        return None

    def refuses(self, asked: Asked) -> str | None:
        return refusal(asked)

    def plan(self, length: int) -> None:
        """Work on the host, once a token: the step that follows, or its replay, attends to `length` tokens."""
        self._length = length
        for of_shape in self._planned.values():
            for capacity, planned in of_shape.items():
                if length <= capacity:  # else it is of another conversation
                    planned.plan(length)

    def attend(self, asked: Asked) -> torch.Tensor:
        assert asked.sinks is None, "refused"
        query, planned, page = asked.query, self._planned_for(asked), _page_tokens(asked.keys)
        keys, values = _pages(asked.keys, page), _pages(asked.values, page)
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        if asked.rotated_query is not None:
            queries = query[:, :, 0].contiguous(), asked.rotated_query[:, :, 0].contiguous()
            planned.run(query=queries, kv_cache=(keys[:, 0], values[:, 0]), out=out[:, :, 0])
        else:
            planned.run(query[:, :, 0], (keys, values), out=out[:, :, 0])
        return out

    def _planned_for(self, asked: Asked) -> _Planned:
        """The wrapper of a shape, made and planned by the first layer that has it, in place of those for less room.

        A conversation that has grown wants these no more; one with less room makes its own again.
        """
        query, (_, kv_heads, capacity, width) = asked.query, asked.keys.shape
        key = asked.is_latent, query.shape, kv_heads, width, query.dtype, asked.scaling, asked.window
        of_shape = self._planned.setdefault(key, {})
        found = of_shape.get(capacity)
        if found is None:
            if torch.cuda.is_current_stream_capturing():
                raise KernelError("FlashInfer is asked for a new shape while a step is captured; run one before")
            found = self._latent(asked) if asked.is_latent else self._grouped(asked)
            found.plan(self._length or int(asked.length))
            for smaller in [each for each in of_shape if each < capacity]:
                del of_shape[smaller]
            of_shape[capacity] = found
        return found

    def _grouped(self, asked: Asked) -> _Planned:
        import flashinfer

        (_, kv_heads, capacity, width), page = asked.keys.shape, _page_tokens(asked.keys)
        heads, dtype, every = asked.query.shape[1], asked.query.dtype, self._every_page(capacity // page)
        scaling, window = asked.scaling, asked.window  # by themselves: plans outlive rooms
        wrapper: Any = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace(self._device),
            kv_layout="HND",
            use_cuda_graph=True,
            use_tensor_cores=True,  # any number of query heads for each of keys and values
            paged_kv_indptr_buffer=self._numbers(2),
            paged_kv_indices_buffer=self._numbers(capacity // page),
            paged_kv_last_page_len_buffer=self._numbers(1),
            backend="fa2",
        )

        def plan(length: int) -> None:
            pages = -(-length // page)
            wrapper.plan(
                indptr=_on_host(0, pages),
                indices=every[:pages],
                last_page_len=_on_host(length - (pages - 1) * page),
                num_qo_heads=heads,
                num_kv_heads=kv_heads,
                head_dim=width,
                page_size=page,
                window_left=window - 1,
                q_data_type=dtype,
                kv_data_type=dtype,
                sm_scale=scaling,
            )

        return _Planned(plan, wrapper.run)

    def _latent(self, asked: Asked) -> _Planned:
        from flashinfer.mla import BatchMLAPagedAttentionWrapper, MLAPlanMetadata

        capacity, page = asked.keys.shape[2], _page_tokens(asked.keys)
        heads, dtype, every = asked.query.shape[1], asked.query.dtype, self._every_page(capacity // page)
        scaling, widths = asked.scaling, (asked.keys.shape[-1], asked.values.shape[-1])
        is_hopper = torch.cuda.get_device_capability(self._device)[0] == 9
        wrapper: Any = BatchMLAPagedAttentionWrapper(
            workspace(self._device),
            use_cuda_graph=True,
            qo_indptr=self._numbers(2),
            kv_indptr=self._numbers(2),
            kv_indices=self._numbers(capacity // page),
            kv_len_arr=self._numbers(1),
            backend="fa3" if is_hopper else "fa2",  # which can plan again after a capture
        )

        def plan(length: int) -> None:
            pages = -(-length // page)
            wrapper.plan(
                metadata=MLAPlanMetadata.csr(_on_host(0, 1), _on_host(0, pages), every[:pages], _on_host(length)),
                num_heads=heads,
                head_dim_ckv=widths[0],
                head_dim_kpe=widths[1],
                page_size=page,
                causal=False,
                sm_scale=scaling,
                q_data_type=dtype,
                kv_data_type=dtype,
                query_layout="split",
                kv_cache_layout="split",
            )

        return _Planned(plan, wrapper.run)

    def _numbers(self, count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.int32, device=self._device)

    def _every_page(self, count: int) -> torch.Tensor:
        return torch.arange(count, dtype=torch.int32, device=self._device)


def refusal(asked: Asked | AskedPrompt) -> str | None:
    """Why FlashInfer has no kernels for that, None if it has."""
    query, first, second = asked.query, asked.keys, asked.values
    if query.dtype not in (torch.float16, torch.bfloat16) or not query.dtype == first.dtype == second.dtype:
        return f"FlashInfer is asked in float16 and bfloat16 alone, queries are {query.dtype}, keys {first.dtype}"
    if asked.sinks is not None:
        return "FlashInfer is not asked with sinks"
    widths = first.shape[-1], second.shape[-1]
    if widths != _LATENT if asked.is_latent else len(set(widths)) > 1 or widths[0] not in _WIDTHS:
        return f"FlashInfer has no kernels for heads of {widths[0]} and {widths[1]} numbers"
    return None


@functools.cache
def workspace(device: torch.device) -> torch.Tensor:
    """What everything of FlashInfer's shares on a device, whose calls are on one stream."""
    return torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)  # zeros, as its documentation asks


def _on_host(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device="cpu")


def _page_tokens(room: torch.Tensor) -> int:
    """Tokens a page: as many as fit a room without a rest."""
    return math.gcd(room.shape[2], _PAGE_TOKENS)


def _pages(room: torch.Tensor, page: int) -> torch.Tensor:
    """`[1, heads, capacity, width]` as `[capacity / page, heads, page, width]`, the same memory."""
    pages: torch.Tensor = room[0].unflatten(1, (-1, page)).transpose(0, 1)
    return pages
