"""Who attends on a device: torch's answer bit for bit on a CPU, kernels close to it, and never a wrong one."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AttentionInterface

from hybrimoe_kt.backends import decode_attention
from hybrimoe_kt.backends.attention_protocol import Asked, Attention
from hybrimoe_kt.backends.decode_attention import DeviceAttention, attention_on, check_kernel, survey
from hybrimoe_kt.backends.flashinfer_attention import FlashInferAttention
from hybrimoe_kt.backends.sdpa_attention import SdpaAttention
from hybrimoe_kt.device import step_graph
from hybrimoe_kt.errors import ConfigError
from tests.kernels.layers import relative_error
from tests.support.attention import chosen, naive

CPU, ELSEWHERE = torch.device("cpu"), torch.device("xpu")
HELD, ROOM, SCALING = 37, 48, 0.11


def randoms(*shape: int, dtype: torch.dtype = torch.float32, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def grouped(heads: int = 8, kv_heads: int = 2, width: int = 64, dtype: torch.dtype = torch.float32) -> Asked:
    """As a cache's room has them."""
    rooms = [randoms(1, kv_heads, ROOM, width, dtype=dtype, seed=seed) for seed in (1, 2)]
    query = randoms(1, 1, heads, width, dtype=dtype, seed=3).transpose(1, 2)
    return Asked(query, *rooms, torch.tensor([HELD]), SCALING)


def latent(heads: int = 6, rank: int = 64, rope: int = 16, dtype: torch.dtype = torch.float32) -> Asked:
    query, rotated_query = [randoms(1, heads, 1, width, dtype=dtype, seed=width) for width in (rank, rope)]
    rooms = [randoms(1, 1, ROOM, width, dtype=dtype, seed=width + 1) for width in (rank, rope)]
    return Asked(query, *rooms, torch.tensor([HELD]), SCALING, rotated_query=rotated_query)


def kept_in(asked: Asked, dtype: torch.dtype) -> Asked:
    return replace(asked, keys=asked.keys.to(dtype), values=asked.values.to(dtype))


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], object]]:
    """What a recorder of steps would call again."""
    works: list[Callable[[], object]] = []

    def opaque(work: Callable[[], object]) -> None:
        works.append(work)
        work()

    monkeypatch.setattr(step_graph, "opaque", opaque)
    return works


@pytest.fixture(autouse=True)
def _no_device_is_remembered() -> Iterator[None]:
    yield
    decode_attention._attention_on.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(8, 2, 64), (4, 4, 128), (6, 2, 288)], ids=str)
def test_torch_on_a_cpu_answers_as_transformers_does(heads: int, kv_heads: int, width: int, dtype: torch.dtype) -> None:
    """Bit for bit, for a cache that has grown to as many tokens in a larger room."""
    asked = grouped(heads, kv_heads, width, dtype)
    module: Any = SimpleNamespace(num_key_value_groups=heads // kv_heads, is_causal=True)
    held = asked.keys[:, :, :HELD], asked.values[:, :, :HELD]
    wanted, _ = AttentionInterface()["sdpa"](module, asked.query, *held, None, scaling=SCALING)
    found = SdpaAttention(CPU).attend(asked)
    assert torch.equal(found.transpose(1, 2), wanted)
    elsewhere = SdpaAttention(ELSEWHERE).attend(asked)
    assert relative_error(elsewhere, found) < {torch.float32: 1e-6}.get(dtype, 1e-2)


@pytest.mark.parametrize("device", [CPU, ELSEWHERE], ids=str)
@pytest.mark.parametrize("window", [0, 1, 20, 90])
@pytest.mark.parametrize("has_sinks", [False, True], ids=["", "sinks"])
def test_torch_knows_windows_and_sinks(device: torch.device, window: int, has_sinks: bool) -> None:
    asked = replace(grouped(), window=window, sinks=randoms(8, seed=9) if has_sinks else None)
    assert relative_error(SdpaAttention(device).attend(asked), naive(asked)) < 1e-6


@pytest.mark.parametrize("device", [CPU, ELSEWHERE], ids=str)
def test_torch_reads_latents(device: torch.device) -> None:
    asked = latent()
    assert relative_error(SdpaAttention(device).attend(asked), naive(asked)) < 1e-6


@pytest.mark.parametrize("kernel", ["sdpa", pytest.param("triton", marks=pytest.mark.kernels)])
def test_a_replay_reads_lengths_and_queries_anew(recorded: list[Callable[[], object]], kernel: str) -> None:
    """Nothing but what was noted is called again, and the answer stands where it stood."""
    if kernel == "triton":
        pytest.importorskip("triton")
    by, calls = attention_on(CPU, kernel), (grouped(4, 2, 64), latent())
    for _ in range(2):
        recorded.clear()  # of a first step, which tries
        answers = [by.attend(asked) for asked in calls]
    assert len(recorded) == 2
    for held in (5, 48, 37):
        for asked in calls:
            asked.length.fill_(held)
            asked.query.mul_(-0.7).add_(0.1)
        for work in recorded:
            work()
        for asked, found in zip(calls, answers, strict=True):
            assert relative_error(found, naive(asked)) < 1e-5


@pytest.mark.parametrize(
    ("asked", "kept"),
    [(torch.bfloat16, torch.float16), (torch.bfloat16, torch.float32), (torch.float16, torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("kernel", ["sdpa", pytest.param("triton", marks=pytest.mark.kernels)])
def test_rooms_may_be_kept_in_another_dtype_than_the_querys(kernel: str, asked: torch.dtype, kept: torch.dtype) -> None:
    """Which answers as if all of them were of the query's, in every bit."""
    if kernel == "triton":
        pytest.importorskip("triton")
    by = attention_on(CPU, kernel)
    for each in (grouped(dtype=torch.float32), latent(dtype=torch.float32)):
        more = {} if each.rotated_query is None else {"rotated_query": each.rotated_query.to(asked)}
        each = replace(kept_in(each, kept), query=each.query.to(asked), **more)
        found = by.attend(each)
        assert found.dtype == asked and torch.equal(found, by.attend(kept_in(each, asked)))
    assert chosen(by) == [kernel]


def test_on_a_cpu_torch_attends() -> None:
    assert survey(CPU) == {
        "flashinfer": "on the CPU torch attends",
        "triton": "on the CPU torch attends",
        "sdpa": None,
    }
    by = attention_on(CPU)
    by.attend(grouped())
    assert chosen(by) == ["sdpa"]
    assert attention_on(CPU) is by


def test_a_kernel_that_cannot_run_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="unknown kernel 'flash', did you mean 'flashinfer'"):
        check_kernel("flash")
    with pytest.raises(ConfigError, match="kernel is 'flashinfer', but FlashInfer has kernels for CUDA, not for cpu"):
        attention_on(CPU, "flashinfer")
    assert survey(torch.device("xpu"))["triton"] == "no kernel was built for xpu devices"


class Wrong(SdpaAttention):
    """Sees one token too few."""

    name = "wrong"

    def attend(self, asked: Asked) -> torch.Tensor:
        return super().attend(replace(asked, length=asked.length - 1))


class Failing(SdpaAttention):
    name = "failing"

    def attend(self, asked: Asked) -> torch.Tensor:
        raise OSError("no compiler")


class Choosy(SdpaAttention):
    name = "choosy"

    def refuses(self, asked: Asked) -> str | None:
        return "heads are wide" if asked.query.shape[-1] > 64 else None


@pytest.mark.parametrize(
    ("candidate", "problem"),
    [(Wrong, r"its answer for a few tokens is \d+% off"), (Failing, "OSError: no compiler")],
    ids=["wrong", "failing"],
)
def test_one_that_answers_wrongly_is_never_asked_again(
    candidate: type[Attention], problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    by = DeviceAttention(CPU, [candidate(CPU), SdpaAttention(CPU)])
    with caplog.at_level(logging.WARNING, decode_attention.__name__):
        for width in (64, 128, 64):
            asked = grouped(width=width)
            assert torch.equal(by.attend(asked), SdpaAttention(CPU).attend(asked))
    assert chosen(by) == ["sdpa"]
    assert len(caplog.messages) == 1
    assert re.fullmatch(rf"{candidate.name} does not attend on cpu from now on: {problem}", caplog.messages[0])


def test_each_shape_goes_to_the_first_that_takes_it(caplog: pytest.LogCaptureFixture) -> None:
    by = DeviceAttention(CPU, [Choosy(CPU), SdpaAttention(CPU)])
    with caplog.at_level(logging.INFO, decode_attention.__name__):
        by.attend(grouped(width=64))
        assert chosen(by) == ["choosy"] and not caplog.messages
        by.attend(grouped(width=128))
        by.attend(grouped(width=128))
    assert chosen(by) == ["choosy", "sdpa"]
    assert caplog.messages == ["choosy does not attend on cpu: heads are wide"]


@pytest.mark.parametrize("device", [CPU, ELSEWHERE], ids=str)
def test_flashinfer_runs_on_cuda_alone(device: torch.device) -> None:
    assert FlashInferAttention.unusable(device) == f"FlashInfer has kernels for CUDA, not for {device.type}"
