"""What attention's kernels read of a long conversation, counted load by load in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime import interpreter

from hybrimoe_kt.kernels import attention
from hybrimoe_kt.kernels.attention import AttentionKernels
from hybrimoe_kt.kernels.decode_attention import naive_decode_attention
from hybrimoe_kt.kernels.latent_attention import naive_latent_attention
from hybrimoe_kt.kernels.targets import TARGETS
from tests.kernels.layers import relative_error

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(torch.cuda.is_available(), reason="counted in the interpreter, which is off beside a GPU"),
]

LENGTH, CAPACITY = 32768, 40960


def loaded_bytes(patch: pytest.MonkeyPatch, launch: Callable[[], None], *rooms: torch.Tensor) -> tuple[int, int]:
    """Bytes that a launch's loads ask for of `rooms`, and of anything else; what a mask hides is not read."""
    counted = [0, 0]
    builder = interpreter.InterpreterBuilder
    load = builder.create_masked_load

    def counting(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        found = load(self, ptrs, mask, *rest)
        first = int(ptrs.data.flat[0])
        is_room = any(0 <= first - room.data_ptr() < room.nbytes for room in rooms)
        counted[not is_room] += int(mask.data.sum()) * found.data.itemsize
        return found

    patch.setattr(builder, "create_masked_load", counting)
    launch()
    return counted[0], counted[1]


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> AttentionKernels:
    """An H100's launch, whose programs take all of their 256 tokens at once, which the interpreter does faster."""
    for name in ("attention_config", "latent_config"):
        choose = getattr(attention, name)
        larger = lambda *given, choose=choose, **more: replace(choose(*given, **more), block=256)  # noqa: E731
        monkeypatch.setattr(attention, name, larger)
    return AttentionKernels(TARGETS["sm_90"])


def randoms(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).half()


def test_keys_and_values_are_read_once_up_to_the_length(
    monkeypatch: pytest.MonkeyPatch, h100: AttentionKernels
) -> None:
    """Eight query heads of 128 share them, in 128 splits; what these answer, and queries, are 5 % beside."""
    query = randoms(8, 128, seed=1)
    keys, values = (randoms(1, CAPACITY, 128, seed=seed) for seed in (2, 3))
    out, length = torch.empty_like(query), torch.tensor([LENGTH])
    launch = h100.grouped(query, keys, values, length, 0.09, out)
    of_rooms, others = loaded_bytes(monkeypatch, launch, keys, values)
    assert of_rooms == keys[:, :LENGTH].nbytes + values[:, :LENGTH].nbytes
    assert of_rooms + others <= 1.05 * of_rooms
    assert relative_error(out, naive_decode_attention(query, keys, values, LENGTH, 0.09)) < 1e-3


@pytest.mark.slow
def test_latents_are_read_once_up_to_the_length(monkeypatch: pytest.MonkeyPatch, h100: AttentionKernels) -> None:
    """16 heads are one program's. As they are wide, what the splits answer, which stays in the L2 cache, is 17 %."""
    query, rotated_query = randoms(16, 512, seed=1), randoms(16, 64, seed=2)
    latents, rotated = randoms(CAPACITY, 512, seed=3), randoms(CAPACITY, 64, seed=4)
    out, length = torch.empty_like(query), torch.tensor([LENGTH])
    launch = h100.latent(query, rotated_query, latents, rotated, length, 0.04, out)
    of_rooms, others = loaded_bytes(monkeypatch, launch, latents, rotated)
    assert of_rooms == latents[:LENGTH].nbytes + rotated[:LENGTH].nbytes
    assert of_rooms + others <= 1.2 * of_rooms
    wanted = naive_latent_attention(query, rotated_query, latents, rotated, LENGTH, 0.04)
    assert relative_error(out, wanted) < 1e-3
