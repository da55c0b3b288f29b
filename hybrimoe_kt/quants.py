"""Every GGML type, once: how its blocks are laid out, in the file and in a slot, and who computes with it.

GPU kernels load 16 bytes at a time. Q4_K and Q5_K blocks (144 and 176 bytes) allow that where they stand; the other
types' blocks (Q6_K 210 bytes, MXFP4 17) are no multiple of 16 bytes: those are taken apart into *planes*. The values of
IQ2 and IQ3 are looked up (`kernels/tables.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["TYPES", "Plane", "QuantType", "Unit", "kernel_types", "llamafile_types", "row_bytes", "type_name"]


@dataclass(frozen=True, slots=True)
class Plane:
    """One field of a block: `width_bytes` at `offset_bytes` within each block."""

    name: str
    offset_bytes: int
    width_bytes: int


@dataclass(frozen=True, slots=True)
class Unit:
    """What one thread of a decode kernel loads at once: 16 bytes of quants, or 32 weights of code words.

    `values`: weights in them; `loads` and `x_loads`: 16-byte loads it takes for those weights and for activations.
    Where weights are code words: `look_ups` of them, `look_up_bytes` each, and `fields`, the loads of up to 8 bytes
    for all the rest of the weights.
    """

    values: int
    loads: int
    x_loads: int
    look_ups: int = 0
    look_up_bytes: int = 4
    fields: int = 0


@dataclass(frozen=True, slots=True)
class QuantType:
    """One row of `TYPES`; `number` is GGML's.

    `planes`: what a slot holds of a matrix one after the other, up to four, in the order of a kernel's offsets; blocks
    as they stand where the type names none. `unit` is set where GPU kernels read the type (`kernels/quants`),
    `llamafile` where kTransformers' CPU kernels do. The torch backends take every type that Transformers or gguf-py
    dequantise, those whose values are of a `dtype` of torch, and those with a routine of ours, `dequantize`:
    "module:function", which makes float32 `[num_blocks, block_values]` of uint8 `[num_blocks, block_bytes]`.
    """

    name: str
    number: int
    block_values: int
    block_bytes: int
    planes: tuple[Plane, ...] = ()
    unit: Unit | None = None
    llamafile: bool = False
    dtype: str | None = None
    dequantize: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "planes", self.planes or (Plane("blocks", 0, self.block_bytes),))

    @property
    def is_float(self) -> bool:
        """Whether decode multiplies float activations rather than int8 ones."""
        return self.block_values == 1

    @property
    def column_step(self) -> int:
        """GPU kernels want rows a multiple of this long."""
        return max(8, self.block_values)

    @property
    def bytes_per_value(self) -> float:
        return self.block_bytes / self.block_values


_Q4_0 = (Plane("qs", 2, 16), Plane("d", 0, 2))
_Q4_1 = (Plane("qs", 4, 16), Plane("dm", 0, 4))
_Q5_0 = (Plane("qs", 6, 16), Plane("qh", 2, 4), Plane("d", 0, 2))
_Q5_1 = (Plane("qs", 8, 16), Plane("qh", 4, 4), Plane("dm", 0, 4))
_Q8_0 = (Plane("qs", 2, 32), Plane("d", 0, 2))
_Q2_K = (Plane("qs", 16, 64), Plane("scales", 0, 16), Plane("dm", 80, 4))
_Q3_K = (Plane("qs", 32, 64), Plane("hmask", 0, 32), Plane("scales", 96, 12), Plane("d", 108, 2))
_Q6_K = (Plane("ql", 0, 128), Plane("qh", 128, 64), Plane("scales", 192, 16), Plane("d", 208, 2))
_IQ4_XS = (Plane("qs", 8, 128), Plane("head", 0, 8))
_MXFP4 = (Plane("qs", 1, 16), Plane("e", 0, 1))
_IQ2_XXS = (Plane("qs", 2, 64), Plane("d", 0, 2))
_IQ2_XS = (Plane("qs", 2, 64), Plane("scales", 66, 8), Plane("d", 0, 2))
_IQ2_S = (Plane("qs and signs", 2, 64), Plane("qh", 66, 8), Plane("scales", 74, 8), Plane("d", 0, 2))
_IQ3_XXS = (Plane("qs", 2, 64), Plane("signs", 66, 32), Plane("d", 0, 2))
_IQ3_S = (Plane("qs", 2, 64), Plane("qh", 66, 8), Plane("signs and scales", 74, 36), Plane("d", 0, 2))

TYPES: dict[int, QuantType] = {
    row.number: row
    for row in (
        QuantType("F32", 0, 1, 4, llamafile=True, dtype="float32"),
        QuantType("F16", 1, 1, 2, unit=Unit(8, 1, 2), llamafile=True, dtype="float16"),
        QuantType("Q4_0", 2, 32, 18, _Q4_0, Unit(32, 1, 2), llamafile=True),
        QuantType("Q4_1", 3, 32, 20, _Q4_1, Unit(32, 1, 2)),
        QuantType(
            "Q5_0", 6, 32, 22, _Q5_0, Unit(32, 1, 2), llamafile=True,
            dequantize="hybrimoe_kt.backends.dequantize:dequantize_q5_0",
        ),
        QuantType("Q5_1", 7, 32, 24, _Q5_1, Unit(32, 1, 2)),
        QuantType("Q8_0", 8, 32, 34, _Q8_0, Unit(16, 1, 1), llamafile=True),
        QuantType("Q8_1", 9, 32, 40),
        QuantType("Q2_K", 10, 256, 84, _Q2_K, Unit(64, 1, 5), llamafile=True),
        QuantType("Q3_K", 11, 256, 110, _Q3_K, Unit(64, 2, 5), llamafile=True),
        QuantType("Q4_K", 12, 256, 144, unit=Unit(32, 2, 2), llamafile=True),
        QuantType("Q5_K", 13, 256, 176, unit=Unit(32, 3, 2), llamafile=True),
        QuantType("Q6_K", 14, 256, 210, _Q6_K, Unit(32, 2, 2), llamafile=True),
        QuantType("Q8_K", 15, 256, 292),
        QuantType("IQ2_XXS", 16, 256, 66, _IQ2_XXS, Unit(32, 0, 2, 4, 8, 2)),
        QuantType("IQ2_XS", 17, 256, 74, _IQ2_XS, Unit(32, 0, 2, 4, 8, 3)),
        QuantType("IQ3_XXS", 18, 256, 98, _IQ3_XXS, Unit(32, 0, 2, 8, 4, 3)),
        QuantType("IQ1_S", 19, 256, 50),
        QuantType("IQ4_NL", 20, 32, 18, _Q4_0, Unit(32, 1, 2)),
        QuantType("IQ3_S", 21, 256, 110, _IQ3_S, Unit(32, 0, 2, 8, 4, 5)),
        QuantType("IQ2_S", 22, 256, 82, _IQ2_S, Unit(32, 0, 2, 4, 8, 5)),
        QuantType("IQ4_XS", 23, 256, 136, _IQ4_XS, Unit(32, 1, 2)),
        QuantType("I8", 24, 1, 1),
        QuantType("I16", 25, 1, 2),
        QuantType("I32", 26, 1, 4),
        QuantType("I64", 27, 1, 8),
        QuantType("F64", 28, 1, 8),
        QuantType("IQ1_M", 29, 256, 56),
        QuantType("BF16", 30, 1, 2, unit=Unit(8, 1, 2), dtype="bfloat16"),
        QuantType("TQ1_0", 34, 256, 54),
        QuantType("TQ2_0", 35, 256, 66),
        QuantType("MXFP4", 39, 32, 17, _MXFP4, Unit(32, 1, 2)),
        QuantType("NVFP4", 40, 64, 36),
        QuantType("Q1_0", 41, 128, 18),
    )
}  # fmt: skip
"""By number. What is not marked for llamafile aborts the process there or comes back wrong (kt-kernel 0.7.2)."""


def type_name(number: int) -> str:
    """Return "Q4_K" for 12; an unknown number is returned as "type 99"."""
    return TYPES[number].name if number in TYPES else f"type {number}"


def row_bytes(number: int, num_values: int) -> int:
    """Bytes of one row of `num_values`, a multiple of the type's block."""
    row = TYPES[number]
    return num_values // row.block_values * row.block_bytes


def kernel_types() -> tuple[QuantType, ...]:
    """The types that GPU kernels read, by number."""
    return tuple(row for row in TYPES.values() if row.unit)


def llamafile_types() -> tuple[QuantType, ...]:
    """The types that kTransformers' CPU kernels compute right, by number."""
    return tuple(row for row in TYPES.values() if row.llamafile)
