"""The byte permutations that the interpreter lacks: what is asked of them, with the instructions as their makers define
them in their place."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from hybrimoe_kt.kernels.blocks import lookup
from hybrimoe_kt.kernels.blocks.dot import DOT4, DP4A, PLAIN, SUDOT4
from hybrimoe_kt.kernels.blocks.lookup import floats, look_up
from hybrimoe_kt.kernels.quants.iq4_nl import T0, T1, T2, T3
from tests.kernels.layers import DEVICE

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(DEVICE.type != "cpu", reason="on a GPU the instructions themselves are tested"),
]


@triton.jit
def instruction(low, high, selectors, FORM: tl.constexpr):
    """`prmt` by four nibbles, `v_perm_b32` by four bytes; a selector above 7 is no place: 0xA5."""
    found = tl.zeros(low.shape, tl.int32)
    for byte in tl.static_range(4):
        place = (selectors >> (4 * byte)) & 0xF if FORM == DP4A else (selectors >> (8 * byte)) & 0xFF
        word = tl.where((place & 4) != 0, high, low)
        chosen = tl.where(place < 8, (word >> (8 * (place & 3))) & 0xFF, 0xA5)
        found |= chosen << (8 * byte)
    return found


@triton.jit
def lookup_kernel(words, low, high, FORM: tl.constexpr):
    at = tl.arange(0, 64)[:, None, None] * 32 + tl.arange(0, 2)[None, :, None] * 16
    word_at = at // 4 + tl.arange(0, 4)[None, None, :]
    low_bytes, high_bytes = look_up(tl.load(words + word_at), T0, T1, T2, T3, FORM)
    at += tl.arange(0, 16)[None, None, :]
    tl.store(low + at, floats(low_bytes, FORM))
    tl.store(high + at, floats(high_bytes, FORM))


@pytest.mark.parametrize("form", [PLAIN, DP4A, DOT4, SUDOT4], ids=["plain", "prmt", "v_perm", "v_perm_rdna"])
def test_every_byte_is_looked_up(form: tl.constexpr, monkeypatch: pytest.MonkeyPatch) -> None:
    from gguf.quants import IQ4_NL

    monkeypatch.setattr(lookup, "_permute", instruction)
    raw = np.random.default_rng(0).permutation(np.arange(2048) % 256).astype(np.uint8)
    low, high = torch.full((2048,), -77.0), torch.full((2048,), -77.0)
    lookup_kernel[(1,)](torch.from_numpy(raw).view(torch.int32), low, high, FORM=form.value)
    table = np.array(IQ4_NL.kvalues, np.float32)
    assert np.array_equal(low.numpy(), table[raw & 0xF]) and np.array_equal(high.numpy(), table[raw >> 4])
