"""Types whose values are looked up: their tables and signs against gguf-py's; `test_unpacking` has their tiles."""

from __future__ import annotations

import gguf.quants
import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from hybrimoe_kt.kernels.blocks.code_words import four_signs
from hybrimoe_kt.kernels.tables import GRIDS, OFFSETS, code_words
from tests.kernels.layers import DEVICE
from tests.support.random_blocks import Type

pytestmark = pytest.mark.kernels

LOOKED_UP = [Type[name] for name in GRIDS]
each_kind = pytest.mark.parametrize("kind", LOOKED_UP, ids=lambda kind: kind.name)


@each_kind
def test_a_table_is_gguf_s_grid(kind: Type) -> None:
    values = getattr(gguf.quants, kind.name)
    values.init_grid()
    begin, (words, width) = OFFSETS[kind.name], GRIDS[kind.name]
    table = code_words(DEVICE)[begin : begin + words * width].view(torch.int8).view(words, width)
    assert np.array_equal(table.cpu().numpy(), values.grid.reshape(words, width))
    assert begin % 128 == 0, "a table begins with a cache line"
    assert int(table.min()) > 0 and int(table.max()) < 64, "what the byte tricks of signs want"


def test_tables_stand_one_behind_the_other() -> None:
    ends = [OFFSETS[name] + words * width for name, (words, width) in GRIDS.items()]
    assert [*[*OFFSETS.values()][1:], code_words(DEVICE).numel()] == ends


@triton.jit
def signs_kernel(words, out):
    at = tl.arange(0, 128)
    tl.store(out + at, four_signs(tl.load(words + at)))


@pytest.mark.parametrize("sevens", [0, 0x0FFFFFFF, 0x05A3C96B], ids=hex)
def test_the_eighth_sign_makes_gguf_s_byte(sevens: int) -> None:
    """Of every group of seven, whatever stands above the 28 bits."""
    out = torch.zeros(128, dtype=torch.int32, device=DEVICE)
    packed = torch.tensor([(index * 0x00204081) ^ sevens for index in range(128)], dtype=torch.int64)
    words = (packed | 0xF0000000).to(torch.uint32).view(torch.int32).to(DEVICE)
    signs_kernel[(1,)](words, out)
    known = np.frombuffer(gguf.quants.IQ2_XXS.ksigns, dtype=np.uint8)
    groups = (packed.numpy()[:, None] >> np.array([0, 7, 14, 21])) & 0x7F
    assert np.array_equal(out.cpu().view(torch.uint8).view(-1, 4).numpy(), known[groups])
