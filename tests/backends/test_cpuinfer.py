"""How a step's CPU share reaches cpuinfer_ext; the arithmetic itself is compared in tests/kt, where it can be built."""

from __future__ import annotations

import ctypes
import sys
import types
from typing import Any

import pytest
import torch

from hybrimoe_kt.backends import cpu_cpuinfer
from hybrimoe_kt.device.backend import Routed
from hybrimoe_kt.device.experts import ExpertMatrix, LayerExperts
from hybrimoe_kt.errors import HostCompatibilityError, KernelError

EXPERTS, TOP_K, HIDDEN, MAX_TOKENS = 8, 3, 256, 16


class Kernel:
    """Expert e multiplies by e + 1; reads and writes memory only when it is run, as the real one does."""

    def __init__(self, config: tuple[Any, ...]) -> None:
        assert config[:4] == (EXPERTS, TOP_K, HIDDEN, 256)

    def forward(self, num_tokens: int, top_k: int, *pointers: int) -> tuple[Any, ...]:
        return (num_tokens, top_k, *pointers)


class Pool:
    def __init__(self, num_threads: int) -> None:
        self.num_threads, self.tasks = num_threads, []

    def submit(self, task: tuple[Any, ...]) -> None:
        self.tasks.append(task)

    def sync(self) -> None:
        for num_tokens, top_k, *pointers in self.tasks:
            shapes = ((num_tokens, top_k), (num_tokens, top_k), (num_tokens, HIDDEN), (num_tokens, HIDDEN))
            types = (torch.int64, torch.float32, torch.float32, torch.float32)
            ids, weights, hidden, out = map(memory, pointers, shapes, types)
            assert ((ids >= 0) & (ids < EXPERTS)).all(), "there is no id that means: skip"
            out.copy_(((ids + 1) * weights).sum(dim=1, keepdim=True) * hidden)
        self.tasks = []


def memory(pointer: int, shape: tuple[int, int], kind: torch.dtype) -> torch.Tensor:
    num_bytes = shape[0] * shape[1] * kind.itemsize
    return torch.frombuffer((ctypes.c_uint8 * num_bytes).from_address(pointer), dtype=kind).view(shape)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> cpu_cpuinfer.CpuInferBackend:
    moe = types.SimpleNamespace(MOE=Kernel, MOEConfig=lambda *values: values)
    monkeypatch.setitem(sys.modules, "cpuinfer_ext", types.SimpleNamespace(moe=moe, CPUInfer=Pool))
    for cached in (cpu_cpuinfer._extension, cpu_cpuinfer._own_pool):
        cached.cache_clear()
    backend = cpu_cpuinfer.CpuInferBackend(2, MAX_TOKENS)
    matrix = ExpertMatrix(torch.zeros(EXPERTS, 256 * HIDDEN * 4, dtype=torch.uint8), 0, 256, HIDDEN)
    backend.add_layer(LayerExperts(0, EXPERTS, TOP_K, HIDDEN, 256, matrix, matrix, matrix))
    yield backend
    for cached in (cpu_cpuinfer._extension, cpu_cpuinfer._own_pool):
        cached.cache_clear()


def step(num_tokens: int, skipped: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    hidden = torch.randn(num_tokens, HIDDEN, generator=generator)
    ids = torch.rand(num_tokens, EXPERTS, generator=generator).argsort(dim=1)[:, :TOP_K]
    ids[torch.rand(ids.shape, generator=generator) < skipped] = -1
    return hidden, ids, torch.rand(num_tokens, TOP_K, generator=generator)


@pytest.mark.parametrize("skipped", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 16])
def test_every_pair_of_the_share_is_computed_once(
    backend: cpu_cpuinfer.CpuInferBackend, num_tokens: int, skipped: float
) -> None:
    hidden, ids, weights = step(num_tokens, skipped)
    for _ in range(2):
        backend.submit(0, Routed(hidden, ids, weights))
        found = backend.wait()
        wanted = torch.where(ids >= 0, (ids + 1) * weights, 0.0).sum(dim=1, keepdim=True) * hidden
        torch.testing.assert_close(found, wanted)
        assert found.dtype == torch.float32


def test_the_pool_computes_with_the_threads_asked_for(backend: cpu_cpuinfer.CpuInferBackend) -> None:
    assert backend._pool.num_threads == 3, "it hands out on one of them"


def test_misuse_is_refused(backend: cpu_cpuinfer.CpuInferBackend) -> None:
    hidden, ids, weights = step(3, 0.0)
    with pytest.raises(KernelError, match="17 tokens in one call"):
        backend.submit(0, Routed(*step(17, 0.0)))
    with pytest.raises(KernelError, match=r"int32.*wanted int64"):
        backend.submit(0, Routed(hidden, ids.int(), weights))
    backend.submit(0, Routed(hidden, ids, weights))
    with pytest.raises(KernelError, match="still in flight"):
        backend.submit(0, Routed(hidden, ids, weights))
    backend.wait()


def test_without_the_extension_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cpuinfer_ext", None)
    cpu_cpuinfer._extension.cache_clear()
    with pytest.raises(HostCompatibilityError, match=r"needs cpuinfer_ext of ktransformers 0\.2\.x"):
        cpu_cpuinfer.CpuInferBackend(1, 8)
