"""Who attends to a prompt on a CUDA device: torch's own here, FlashInfer as stand-ins with its 0.7.2 signatures."""

from __future__ import annotations

import logging
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from hybrimoe_kt.backends import prompt_attention
from hybrimoe_kt.backends.attention_protocol import AskedPrompt
from hybrimoe_kt.backends.prompt_attention import FlashInferPrompts, PromptAttention, TorchPrompts, prompts_on
from tests.kernels.layers import relative_error

CPU, SCALING = torch.device("cpu"), 0.11


def naive(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float, window: int = 0
) -> torch.Tensor:
    """Token by token in float32: `[heads, tokens, width]`, keys and values `[kv_heads, length, width]`."""
    (heads, tokens, _), length = query.shape, keys.shape[1]
    out = torch.empty(heads, tokens, values.shape[-1])
    for head in range(heads):
        own = head * len(keys) // heads
        for token in range(tokens):
            end = length - tokens + token + 1
            seen = slice(max(0, end - window) if window else 0, end)
            scores = keys[own, seen].float() @ query[head, token].float() * scaling
            out[head, token] = scores.softmax(0) @ values[own, seen].float()
    return out


def randoms(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def single_prefill_with_kv_cache(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale_q: Any = None, scale_k: Any = None, scale_v: Any = None,
    o_dtype: Any = None, custom_mask: Any = None, packed_custom_mask: Any = None, causal: bool = False,
    kv_layout: str = "NHD", pos_encoding_mode: str = "NONE", use_fp16_qk_reduction: bool = False,
    sm_scale: float | None = None, window_left: int = -1,
) -> torch.Tensor:  # fmt: skip
    assert causal and kv_layout == "HND" and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert q.shape[1] % k.shape[0] == 0 and sm_scale is not None
    return naive(q.transpose(0, 1), k, v, sm_scale, window_left + 1).transpose(0, 1).to(q.dtype).contiguous()


class Metadata:
    @classmethod
    def csr(cls, *parts: torch.Tensor) -> Any:
        assert {part.dtype for part in parts} == {torch.int32}
        return parts


class Latent:
    """BatchMLAPagedAttentionWrapper, without a graph."""

    def __init__(self, float_workspace_buffer: torch.Tensor, use_cuda_graph: bool = False) -> None:
        assert float_workspace_buffer.dtype == torch.uint8 and not use_cuda_graph

    def plan(
        self, *, metadata: Any, num_heads: int, head_dim_ckv: int, head_dim_kpe: int, page_size: int, causal: bool,
        sm_scale: float, q_data_type: torch.dtype, kv_data_type: torch.dtype, query_layout: str = "packed",
        kv_cache_layout: str = "packed",
    ) -> None:  # fmt: skip
        assert causal and page_size == 1 and query_layout == kv_cache_layout == "split" and q_data_type == kv_data_type
        self.ends, self.kv_ends, self.pages, self.length = metadata
        self.planned, self.scale = (num_heads, head_dim_ckv, head_dim_kpe), sm_scale

    def run(self, *, query: Any, kv_cache: Any) -> torch.Tensor:
        (part, turned), (latents, rotated) = query, kv_cache
        assert self.planned == (part.shape[1], part.shape[2], turned.shape[2]) and part.is_contiguous()
        assert self.ends.tolist() == [0, len(part)] and self.kv_ends.tolist() == [0, *self.length.tolist()]
        used = self.pages.long()
        keys = torch.cat([latents[used, 0], rotated[used, 0]], dim=-1)[None]
        queries = torch.cat([part, turned], dim=-1).transpose(0, 1)
        return naive(queries, keys, latents[used, 0][None], self.scale).transpose(0, 1).to(part.dtype)


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> FlashInferPrompts:
    package, inner = ModuleType("flashinfer"), ModuleType("flashinfer.mla")
    package.single_prefill_with_kv_cache = single_prefill_with_kv_cache  # type: ignore[attr-defined]
    inner.BatchMLAPagedAttentionWrapper, inner.MLAPlanMetadata = Latent, Metadata  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer", package)
    monkeypatch.setitem(sys.modules, "flashinfer.mla", inner)
    return FlashInferPrompts()


@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize(("tokens", "length"), [(2, 2), (5, 5), (5, 31), (2, 40)])
def test_every_token_sees_itself_and_what_was_before(
    flashinfer: FlashInferPrompts, tokens: int, length: int, window: int
) -> None:
    """Keys are the first tokens of a longer room, queries lie as models make them."""
    query = randoms(1, tokens, 6, 64, seed=1).transpose(1, 2)
    keys, values = (randoms(1, 2, 64, 64, seed=seed)[:, :, :length] for seed in (2, 3))
    wanted = naive(query[0], keys[0], values[0], SCALING, window)
    asked = AskedPrompt(query, keys, values, SCALING, window)
    for reader in (flashinfer, TorchPrompts()):
        if reader.refuses(asked) is None:
            found = reader.attend(asked)
            assert relative_error(found[0], wanted) < 1e-2 and found.shape == query.shape
    assert flashinfer.refuses(asked) is None and (TorchPrompts().refuses(asked) is None) == (window == 0)


def test_latents(flashinfer: FlashInferPrompts) -> None:
    part, turned = randoms(1, 4, 5, 512, seed=1) * 0.1, randoms(1, 4, 5, 64, seed=2)
    latents, rotated = randoms(1, 1, 64, 512, seed=3)[:, :, :23], randoms(1, 1, 64, 64, seed=4)[:, :, :23]
    asked = AskedPrompt(part, latents, rotated, SCALING, rotated_query=turned)
    found = flashinfer.attend(asked)
    queries, keys = torch.cat([part, turned], dim=-1), torch.cat([latents, rotated], dim=-1)
    assert relative_error(found[0], naive(queries[0], keys[0], latents[0], SCALING)) < 1e-2
    assert flashinfer.refuses(asked) is None and TorchPrompts().refuses(asked) is not None


@pytest.mark.parametrize("is_latent", [False, True])
def test_who_answers_wrong_is_not_asked_again(
    flashinfer: FlashInferPrompts, is_latent: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong: Any = Latent if is_latent else None
    if is_latent:
        monkeypatch.setattr(wrong, "run", lambda self, *, query, kv_cache: query[0] * 0)
    else:
        package: Any = sys.modules["flashinfer"]
        package.single_prefill_with_kv_cache = lambda q, k, v, **_: q * 0
    attention = PromptAttention(CPU, [flashinfer, TorchPrompts()])
    first, second = (512, 64) if is_latent else (64, 64)
    asked = AskedPrompt(
        randoms(1, 4, 5, first, seed=1), randoms(1, 1, 9, first, seed=2), randoms(1, 1, 9, second, seed=3), SCALING,
        rotated_query=randoms(1, 4, 5, second, seed=4) if is_latent else None,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            answer = attention.attend(asked)
            assert (answer is None) if is_latent else (answer is not None and bool(answer.any()))
    (warning,) = caplog.messages
    assert "flashinfer does not attend to prompts on cpu: its answer for a few tokens is 100% off" in warning


def test_a_kernel_that_cannot_be_built_is_one_warning(
    flashinfer: FlashInferPrompts, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("nvcc not found")

    package: Any = sys.modules["flashinfer"]
    package.single_prefill_with_kv_cache = broken
    attention = PromptAttention(CPU, [flashinfer])
    with caplog.at_level(logging.WARNING):
        parts = randoms(1, 4, 5, 64, seed=1), randoms(1, 2, 9, 64, seed=2), randoms(1, 2, 9, 64, seed=3)
        assert attention.attend(AskedPrompt(*parts, SCALING)) is None
    assert "nvcc not found" in caplog.text


def test_on_a_cpu_the_models_own_code_attends(monkeypatch: pytest.MonkeyPatch) -> None:
    assert prompts_on(CPU, "auto") is None
    card = torch.device("cuda:0")
    monkeypatch.setattr(prompt_attention.FlashInferAttention, "unusable", staticmethod(lambda device: None))
    found = {kernel: prompts_on.__wrapped__(card, kernel) for kernel in ("auto", "flashinfer", "triton", "sdpa")}
    names = {kernel: [reader.name for reader in made._readers] for kernel, made in found.items() if made is not None}
    assert names == {"auto": ["flashinfer", "torch"], "flashinfer": ["flashinfer"], "triton": [], "sdpa": ["torch"]}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or HIP device")
@pytest.mark.parametrize("kernel", ["auto", "flashinfer", "sdpa"])
@pytest.mark.parametrize("is_latent", [False, True])
@pytest.mark.parametrize(("tokens", "length"), [(9, 9), (64, 700)])
def test_on_a_device_prompts_are_read_as_here(kernel: str, is_latent: bool, tokens: int, length: int) -> None:
    """Keys lie in a longer room; None where nobody takes the shape, as torch takes no latents."""
    width = (512, 64) if is_latent else (128, 128)
    query = randoms(1, tokens, 8, width[0], seed=1).transpose(1, 2)
    turned = randoms(1, 8, tokens, width[1], seed=2) if is_latent else None
    heads = 1 if is_latent else 2
    first, second = (randoms(1, heads, 1024, each, seed=3 + at)[:, :, :length] for at, each in enumerate(width))
    there = AskedPrompt(
        *(part.cuda() for part in (query, first, second)), SCALING / 3,
        rotated_query=None if turned is None else turned.cuda(),
    )  # fmt: skip
    prompts = prompts_on(there.query.device, kernel)
    assert prompts is not None
    answer = prompts.attend(there)
    if kernel != "flashinfer" and not is_latent:
        assert answer is not None, "torch takes it in any case"
    if answer is not None:
        keys, queries = (
            (first, query) if turned is None else (torch.cat([first, second], -1), torch.cat([query, turned], -1))
        )
        wanted = naive(queries[0], keys[0], (second if turned is None else first)[0], SCALING / 3)
        assert relative_error(answer[0].cpu(), wanted) < 2e-2
