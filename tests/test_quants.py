"""The table of types against gguf-py's, and against who is said to compute with them."""

from __future__ import annotations

import gguf
import pytest

from hybrimoe_kt.quants import TYPES, QuantType, kernel_types, llamafile_types, row_bytes, type_name


def test_it_is_gguf_s_table() -> None:
    assert {n: (row.name, row.block_values, row.block_bytes) for n, row in TYPES.items()} == {
        int(kind): (kind.name, *size) for kind, size in gguf.GGML_QUANT_SIZES.items()
    }
    assert list(TYPES) == sorted(TYPES)


@pytest.mark.parametrize("row", TYPES.values(), ids=lambda row: row.name)
def test_planes_cover_a_block_once(row: QuantType) -> None:
    covered = sorted(b for p in row.planes for b in range(p.offset_bytes, p.offset_bytes + p.width_bytes))
    assert covered == list(range(row.block_bytes))
    assert len(row.planes) <= 4, "a kernel takes four offsets"


def test_kernels_find_their_planes_on_16_bytes_or_need_no_alignment() -> None:
    """The first plane, or the block as it stands, is read 16 bytes at a time."""
    for row in kernel_types():
        assert row.planes[0].width_bytes % 16 == 0 or row.is_float, row.name


def test_who_computes() -> None:
    names = "F16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS BF16 MXFP4"
    looked_up = {"IQ3_XXS", "IQ3_S", "IQ2_XXS", "IQ2_XS", "IQ2_S"}
    assert {row.name for row in kernel_types() if row.unit and row.unit.look_ups} == looked_up
    computed = [row.name for row in kernel_types() if row.name not in looked_up]
    assert computed == names.split()
    assert {row.number for row in llamafile_types()} == {0, 1, 2, 6, 8, 10, 11, 12, 13, 14}


def test_names_and_sizes() -> None:
    assert (type_name(12), type_name(99)) == ("Q4_K", "type 99")
    assert row_bytes(14, 512) == 420
