"""How blocks are read, apart from any kernel's sums: tiles bit for bit, dot products of units as whole numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf.quants import dequantize

pytest.importorskip("triton")

import triton
import triton.language as tl

from hybrimoe_kt.backends.gpu_triton import target_of
from hybrimoe_kt.device.layout import MatrixLayout
from hybrimoe_kt.kernels.quants.dispatch import step_columns, step_tiles, unit_dots
from hybrimoe_kt.kernels.tables import code_words
from hybrimoe_kt.quants import TYPES
from tests.kernels.layers import DEVICE, KINDS
from tests.support.random_blocks import Type

pytestmark = pytest.mark.kernels

TARGET, TABLES = target_of(DEVICE), code_words(DEVICE)
ROWS = 16
SCALES = {Type.Q2_K: (80, 82), Type.Q3_K: (108,), Type.Q6_K: (208,)} | dict.fromkeys(
    (Type.Q4_1, Type.Q5_1, Type.Q4_K, Type.Q5_K), (0, 2)
)
"""Where blocks keep their halves; the rest begin with one."""

each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


@triton.jit
def tiles_kernel(
    memory, tables, o0, o1, o2, o3, columns, out, KIND: tl.constexpr, FORM: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    row = tl.arange(0, ROWS)
    for step in range(0, tl.cdiv(columns, 64)):
        low, high = step_tiles(KIND, FORM, memory, tables, o0, o1, o2, o3, row, step, columns)
        low_columns, high_columns = step_columns(KIND, step)
        at = out + row[:, None] * columns
        tl.store(at + low_columns[None, :], low, mask=low_columns[None, :] < columns)
        tl.store(at + high_columns[None, :], high, mask=high_columns[None, :] < columns)


@triton.jit
def units_kernel(
    memory, tables, o0, o1, o2, o3, columns, xq, xs, xm, out,
    KIND: tl.constexpr, FORM: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, NUM_UNITS: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, ROWS)[:, None]
    unit = tl.arange(0, UNITS)[None, :]
    inside = tl.minimum(unit, NUM_UNITS - 1)
    dots = unit_dots(KIND, FORM, memory, tables, o0, o1, o2, o3, row, inside, columns, xs, xq, xs, xm)
    tl.store(out + row * NUM_UNITS + unit, dots, mask=unit < NUM_UNITS)


def drawn(kind: Type) -> tuple[np.ndarray, int]:
    """Blocks of random bytes `[ROWS, row_bytes]`, and the oddest number of columns that is legal."""
    row = TYPES[kind]
    columns = {8: 264, 32: 352, 256: 512}[row.column_step]
    random = np.random.default_rng(int(kind))
    return random.integers(0, 256, (ROWS, columns // row.block_values * row.block_bytes), dtype=np.uint8), columns


def laid_out(raw: np.ndarray, kind: Type, columns: int) -> tuple[torch.Tensor, MatrixLayout]:
    layout = MatrixLayout.at(0, int(kind), ROWS, columns)
    memory = torch.full((layout.end_bytes,), 0xFF, dtype=torch.uint8)
    layout.write(torch.from_numpy(raw).flatten(), memory)
    return memory.to(DEVICE), layout


@each_kind
@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow encountered")
def test_tiles_are_what_gguf_dequantises_bit_for_bit(kind: Type) -> None:
    """Scales are any halves, infinite and NaN ones too."""
    raw, columns = drawn(kind)
    wanted = torch.from_numpy(np.array(dequantize(raw, kind), dtype=np.float32))
    memory, layout = laid_out(raw, kind, columns)
    found = torch.full(wanted.shape, -77.0, device=DEVICE)
    form = TARGET.dot_form
    tiles_kernel[(1,)](memory, TABLES, *layout.offsets, columns, found, KIND=int(kind), FORM=form, ROWS=ROWS)
    found = found.cpu()
    assert torch.equal(found.isnan(), wanted.isnan())
    number = ~wanted.isnan()
    assert number.float().mean() > 0.5
    assert torch.equal(found[number].view(torch.int32), wanted[number].view(torch.int32))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not TYPES[kind].is_float], ids=lambda kind: kind.name)
def test_dots_of_units_are_exact(kind: Type) -> None:
    """With scales of 1 weights are whole numbers or halves and eighths, and float32 holds every sum of them here."""
    raw, columns = drawn(kind)
    blocks = raw.reshape(-1, TYPES[kind].block_bytes)
    for offset in SCALES.get(kind, (0,)):
        blocks[:, offset : offset + 2] = np.ones(1, np.float16).view(np.uint8)
    if kind == Type.MXFP4:
        blocks[:, 0] = 128
    weights = np.array(dequantize(raw, kind), dtype=np.float64)
    quants = np.random.default_rng(1).integers(-127, 128, columns, dtype=np.int8)
    sums = torch.from_numpy(quants.reshape(-1, 32).sum(axis=1, dtype=np.float32)).to(DEVICE)
    memory, layout = laid_out(raw, kind, columns)
    unit = TYPES[kind].unit
    assert unit
    num_units = columns // unit.values
    found = torch.full((ROWS, num_units), float("nan"), device=DEVICE)
    units_kernel[(1,)](
        memory, TABLES, *layout.offsets, columns,
        torch.from_numpy(quants).view(torch.int32).to(DEVICE), torch.ones_like(sums), sums, found,
        KIND=int(kind), FORM=TARGET.dot_form, ROWS=ROWS, UNITS=triton.next_power_of_2(num_units), NUM_UNITS=num_units,
    )  # fmt: skip
    assert np.array_equal(found.cpu().double().sum(dim=1).numpy(), weights @ quants.astype(np.float64))
