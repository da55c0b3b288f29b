"""What FlashInfer is given: stand-ins with its 0.7.2 signatures attend to the pages that they are told of.

FlashInfer itself wants a GPU and a CUDA compiler, so nothing of it runs here.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch

from hybrimoe_kt.backends.attention_protocol import Asked
from hybrimoe_kt.backends.decode_attention import DeviceAttention, workspace_bytes
from hybrimoe_kt.backends.flashinfer_attention import FlashInferAttention
from hybrimoe_kt.backends.sdpa_attention import SdpaAttention
from hybrimoe_kt.errors import KernelError
from hybrimoe_kt.kernels.decode_attention.naive import naive_decode_attention
from hybrimoe_kt.kernels.latent_attention.naive import naive_latent_attention
from tests.kernels.layers import relative_error
from tests.support.attention import chosen, naive

CPU, SCALING, ROOM = torch.device("cpu"), 0.11, 72  # pages of 8
LATENT = {"rotated_query": torch.empty(1, 4, 1, 64)}
made: list[Any] = []


class Decode:
    """BatchDecodeWithPagedKVCacheWrapper: HND pages, metadata in the buffers that a graph reads."""

    def __init__(
        self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD", use_cuda_graph: bool = False,
        use_tensor_cores: bool = False, paged_kv_indptr_buffer: torch.Tensor | None = None,
        paged_kv_indices_buffer: torch.Tensor | None = None, paged_kv_last_page_len_buffer: torch.Tensor | None = None,
        backend: str = "auto", jit_args: Any = None,
    ) -> None:  # fmt: skip
        assert kv_layout == "HND" and use_cuda_graph and use_tensor_cores and backend == "fa2"
        assert float_workspace_buffer.numel() == 128 << 20 and not float_workspace_buffer.any()
        assert paged_kv_indptr_buffer is not None and len(paged_kv_indptr_buffer) == 2
        assert paged_kv_last_page_len_buffer is not None and len(paged_kv_last_page_len_buffer) == 1
        assert paged_kv_indices_buffer is not None
        self.indptr, self.indices, self.last = (
            paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer
        )  # fmt: skip
        made.append(self)

    def plan(
        self, indptr: torch.Tensor, indices: torch.Tensor, last_page_len: torch.Tensor, num_qo_heads: int,
        num_kv_heads: int, head_dim: int, page_size: int, *, pos_encoding_mode: str = "NONE", window_left: int = -1,
        q_data_type: Any = "float16", kv_data_type: Any = None, sm_scale: float | None = None,
    ) -> None:  # fmt: skip
        assert {part.dtype for part in (indptr, indices, last_page_len)} == {torch.int32}
        assert indptr.device.type == last_page_len.device.type == "cpu", "else planning would wait for the device"
        assert len(indices) == indptr[-1] and kv_data_type == q_data_type and pos_encoding_mode == "NONE"
        self.indptr.copy_(indptr)
        self.indices[: len(indices)].copy_(indices)
        self.last.copy_(last_page_len)
        self.planned = num_qo_heads, num_kv_heads, head_dim, page_size, q_data_type
        self.window, self.scale = window_left + 1, sm_scale or 0.0

    def run(
        self, q: torch.Tensor, paged_kv_cache: tuple[torch.Tensor, torch.Tensor], *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        (pages, kv_heads, page, width), heads = paged_kv_cache[0].shape, q.shape[1]
        assert self.planned == (heads, kv_heads, width, page, q.dtype) and out is not None
        assert pages == len(self.indices) and out.shape == q.shape == (1, heads, width)
        used, length = self.indices[: self.indptr[1]], int((self.indptr[1] - 1) * page + self.last[0])
        keys, values = (part[used.long()].transpose(0, 1).flatten(1, 2) for part in paged_kv_cache)
        return out.copy_(naive_decode_attention(q[0], keys, values, length, self.scale, self.window))


@dataclass
class Metadata:
    parts: Sequence[torch.Tensor]

    @classmethod
    def csr(
        cls, qo_indptr: torch.Tensor, kv_indptr: torch.Tensor, kv_indices: torch.Tensor, kv_len_arr: torch.Tensor
    ) -> Metadata:
        return cls((qo_indptr, kv_indptr, kv_indices, kv_len_arr))


class Latent:
    """BatchMLAPagedAttentionWrapper."""

    def __init__(
        self, float_workspace_buffer: torch.Tensor, use_cuda_graph: bool = False, qo_indptr: torch.Tensor | None = None,
        kv_indptr: torch.Tensor | None = None, kv_indices: torch.Tensor | None = None,
        kv_len_arr: torch.Tensor | None = None, backend: str = "auto",
    ) -> None:  # fmt: skip
        assert use_cuda_graph and backend == "fa3"
        self.buffers: list[Any] = [qo_indptr, kv_indptr, kv_indices, kv_len_arr]
        made.append(self)

    def plan(
        self, *, metadata: Metadata, num_heads: int, head_dim_ckv: int, head_dim_kpe: int, page_size: int,
        causal: bool, sm_scale: float, q_data_type: torch.dtype, kv_data_type: torch.dtype,
        query_layout: str = "packed", kv_cache_layout: str = "packed",
    ) -> None:  # fmt: skip
        assert query_layout == kv_cache_layout == "split" and not causal and q_data_type == kv_data_type
        for buffer, part in zip(self.buffers, metadata.parts, strict=True):
            assert part.dtype == torch.int32
            buffer[: len(part)].copy_(part)
        self.planned, self.scale = (num_heads, head_dim_ckv, head_dim_kpe, page_size), sm_scale

    def run(self, *, query: Any, kv_cache: Any, out: torch.Tensor | None = None) -> torch.Tensor:
        (latents, rotated), (part, turned) = kv_cache, query
        assert latents.dim() == rotated.dim() == 3 and out is not None
        assert self.planned == (part.shape[1], part.shape[2], turned.shape[2], latents.shape[1])
        qo, indptr, indices, length = self.buffers
        assert qo.tolist() == [0, 1]
        used = indices[: indptr[1]].long()
        rooms = latents[used].flatten(0, 1), rotated[used].flatten(0, 1)
        return out.copy_(naive_latent_attention(part[0], turned[0], *rooms, int(length[0]), self.scale))


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> FlashInferAttention:
    package, inner = ModuleType("flashinfer"), ModuleType("flashinfer.mla")
    package.BatchDecodeWithPagedKVCacheWrapper = Decode  # type: ignore[attr-defined]
    inner.BatchMLAPagedAttentionWrapper, inner.MLAPlanMetadata = Latent, Metadata  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer", package)
    monkeypatch.setitem(sys.modules, "flashinfer.mla", inner)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    made.clear()
    return FlashInferAttention(CPU)


def randoms(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("window", [0, 1, 20])
def test_keys_and_values_are_pages_of_a_room(flashinfer: FlashInferAttention, window: int) -> None:
    """Two layers share a wrapper, which is planned once a token, and never again for what was captured with it."""
    query = randoms(1, 1, 6, 64, seed=1).transpose(1, 2)
    layers = [[randoms(1, 2, ROOM, 64, seed=10 * layer + part) for part in (2, 3)] for layer in range(2)]
    length = torch.tensor([1])
    for held in (1, 8, 9, 61, ROOM, 30):
        length.fill_(held)
        flashinfer.plan(held)
        for keys, values in layers:
            asked = Asked(query, keys, values, length, SCALING, window)
            assert relative_error(flashinfer.attend(asked), naive(asked)) < 1e-2, held
    assert len(made) == 1


def test_latents_are_pages_of_a_room(flashinfer: FlashInferAttention) -> None:
    queries = randoms(1, 5, 1, 512, seed=1), randoms(1, 1, 5, 64, seed=2).transpose(1, 2)
    rooms = randoms(1, 1, ROOM, 512, seed=3), randoms(1, 1, ROOM, 64, seed=4)
    asked = Asked(queries[0], *rooms, torch.tensor([1]), 0.04, rotated_query=queries[1])
    for held in (1, 8, 61, ROOM):
        asked.length.fill_(held)
        flashinfer.plan(held)
        assert relative_error(flashinfer.attend(asked), naive(asked)) < 1e-2, held
    assert len(made) == 1


def test_a_room_that_grew_has_a_wrapper_in_place_of_the_last_one(flashinfer: FlashInferAttention) -> None:
    """So that a step plans one for layers of a shape. A conversation with less room makes its own beside it."""
    query, queries = randoms(1, 4, 1, 64, seed=1), randoms(1, 6, 1, 64, seed=4)
    small, large = randoms(1, 2, 16, 64, seed=2), randoms(1, 2, 48, 64, seed=3)

    def attend(query: torch.Tensor, room: torch.Tensor, held: int) -> None:
        flashinfer.plan(held)
        asked = Asked(query, room, room, torch.tensor([held]), SCALING)
        assert relative_error(flashinfer.attend(asked), naive(asked)) < 1e-2

    def planned() -> list[int]:
        for each in made:
            each.indptr.fill_(-1)
        flashinfer.plan(5)
        return [at for at, each in enumerate(made) if each.indptr[0] == 0]

    attend(query, small, 16), attend(queries, small, 16)
    assert planned() == [0, 1]
    attend(query, large, 40)
    assert planned() == [1, 2], "layers of the other shape have not grown"
    attend(queries, large, 41)
    assert planned() == [2, 3]
    attend(query, small, 7), attend(query, large, 48), attend(query, small, 8)
    assert planned() == [2, 3, 4]


@pytest.mark.parametrize("is_latent", [False, True], ids=["grouped", "latent"])
def test_plans_outlive_rooms(flashinfer: FlashInferAttention, is_latent: bool) -> None:
    width, more = 64, {}
    if is_latent:
        width, more = 512, {"rotated_query": randoms(1, 4, 1, 64, seed=4)}
    keys, values = randoms(1, 1, 16, width, seed=2), randoms(1, 1, 16, 64, seed=3)
    asked = Asked(randoms(1, 4, 1, width, seed=1), keys, values, torch.tensor([9]), SCALING, **more)
    rooms = [weakref.ref(room) for room in (keys, values)]
    flashinfer.attend(asked)
    del asked, keys, values
    assert not any(room() is not None for room in rooms), "a conversation that is over takes no memory"
    flashinfer.plan(3)


@pytest.mark.parametrize(
    ("kernel", "widths", "kept", "is_latent", "takes"),
    [
        ("auto", (128, 128), torch.bfloat16, False, 176 << 20),
        ("flashinfer", (512, 64), torch.bfloat16, True, 176 << 20),
        ("triton", (128, 128), torch.bfloat16, False, 0),
        ("auto", (96, 96), torch.bfloat16, False, 0),
        ("auto", (128, 128), torch.float16, False, 0),
    ],
)
def test_its_workspace_is_planned_where_it_would_attend(
    monkeypatch: pytest.MonkeyPatch,
    kernel: str,
    widths: tuple[int, int],
    kept: torch.dtype,
    is_latent: bool,
    takes: int,
) -> None:
    card = torch.device("cuda:0")
    assert workspace_bytes(CPU, kernel, widths, torch.bfloat16, kept, is_latent=is_latent) == 0
    monkeypatch.setattr(FlashInferAttention, "unusable", staticmethod(lambda device: None))
    assert workspace_bytes(card, kernel, widths, torch.bfloat16, kept, is_latent=is_latent) == takes


def test_no_wrapper_is_made_while_a_step_is_captured(
    flashinfer: FlashInferAttention, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    query, room = randoms(1, 4, 1, 64, seed=1), randoms(1, 2, 16, 64, seed=2)
    with pytest.raises(KernelError, match="asked for a new shape while a step is captured; run one before"):
        flashinfer.attend(Asked(query, room, room, torch.tensor([3]), SCALING))


def test_a_try_plans_nothing_of_the_step_it_is_made_in(flashinfer: FlashInferAttention) -> None:
    by = DeviceAttention(CPU, [flashinfer, SdpaAttention(CPU)])
    query, room = randoms(1, 4, 1, 64, seed=1), randoms(1, 2, 64, 64, seed=2)
    by.plan(50)
    asked = Asked(query, room, room, torch.tensor([50]), SCALING)
    found = by.attend(asked)
    assert chosen(by) == ["flashinfer"] and len(made) == 2
    assert relative_error(found, naive(asked)) < 1e-2


def test_rooms_in_another_dtype_go_to_the_next(flashinfer: FlashInferAttention) -> None:
    """Call by call, so that other layers keep it."""
    by = DeviceAttention(CPU, [flashinfer, SdpaAttention(CPU)])
    query, room, length = randoms(1, 4, 1, 64, seed=1), randoms(1, 2, 64, 64, seed=2), torch.tensor([50])
    by.plan(50)
    for kept in (room, room.half(), room, room.float()):
        asked = Asked(query, kept, kept, length, SCALING)
        assert relative_error(by.attend(asked), naive(asked)) < 1e-2
    assert chosen(by) == ["flashinfer", "sdpa"] and len(made) == 2, "one of them tried"


@pytest.mark.parametrize(
    ("width", "second", "dtype", "more", "reason"),
    [
        (96, 96, torch.bfloat16, {}, "has no kernels for heads of 96 and 96 numbers"),
        (64, 64, torch.float32, {}, "in float16 and bfloat16 alone, queries are torch.float32"),
        (64, 64, torch.bfloat16, {"sinks": torch.zeros(4)}, "is not asked with sinks"),
        (256, 64, torch.bfloat16, LATENT, "has no kernels for heads of 256 and 64 numbers"),
        (512, 64, torch.bfloat16, LATENT, None),
        (128, 128, torch.float16, {"window": 9}, None),
    ],
)
def test_what_it_has_no_kernels_for_is_refused(
    width: int, second: int, dtype: torch.dtype, more: dict[str, Any], reason: str | None
) -> None:
    rooms = torch.empty(1, 1, 16, width, dtype=dtype), torch.empty(1, 1, 16, second, dtype=dtype)
    query = torch.empty(1, 4, 1, width, dtype=dtype)
    found = FlashInferAttention(CPU).refuses(Asked(query, *rooms, torch.tensor([3]), SCALING, **more))
    assert (found is None) == (reason is None) and (reason or "") in (found or "")
