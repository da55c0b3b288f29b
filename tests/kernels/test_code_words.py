"""Types whose values are looked up: their tables against gguf-py's, and tiles bit by bit against its dequantiser."""

from __future__ import annotations

import gguf.quants
import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from hybrimoe_kt.backends.dequantize import dequantize
from hybrimoe_kt.device.layout import MatrixLayout
from hybrimoe_kt.kernels.blocks.code_words import four_signs
from hybrimoe_kt.kernels.quants.dispatch import step_columns, step_tiles
from hybrimoe_kt.kernels.tables import GRIDS, OFFSETS, code_words
from tests.kernels.layers import DEVICE
from tests.support.random_blocks import Type, random_blocks

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


@triton.jit
def tiles_kernel(mem, tables, o0, o1, o2, o3, columns, out, KIND: tl.constexpr, ROWS: tl.constexpr):
    row = tl.arange(0, ROWS)
    for step in range(0, columns // 64):
        low, high = step_columns(KIND, step)
        w_low, w_high = step_tiles(KIND, mem, tables, o0, o1, o2, o3, row, step, columns)
        tl.store(out + (row * columns)[:, None] + low[None, :], w_low)
        tl.store(out + (row * columns)[:, None] + high[None, :], w_high)


@each_kind
def test_tiles_are_gguf_s_values_to_the_last_bit(kind: Type) -> None:
    """Random bytes, so every code word, sign and scale is as likely; the matrix does not begin the memory."""
    rows, columns = 16, 768
    raw = random_blocks(np.random.default_rng(int(kind)), kind, rows, columns)
    layout = MatrixLayout.at(256, int(kind), rows, columns)
    memory = torch.full((layout.end_bytes,), 0xFF, dtype=torch.uint8)
    blocks = torch.from_numpy(np.ascontiguousarray(raw)).flatten()
    layout.write(blocks, memory)
    assert torch.equal(layout.read(memory), blocks)
    out = torch.full((rows, columns), float("nan"), device=DEVICE)
    tiles_kernel[(1,)](memory.to(DEVICE), code_words(DEVICE), *layout.offsets, columns, out, KIND=int(kind), ROWS=rows)
    assert torch.equal(out.cpu(), dequantize(blocks, int(kind), (rows, columns)))
