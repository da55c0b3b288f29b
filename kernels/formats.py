"""The quantisation types that kernels read, with what a launch or a count of instructions needs to know of each."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FORMATS", "Format"]


@dataclass(frozen=True, slots=True)
class Format:
    """One GGML type. `planes` are the names of its parts in a slot, in the order of a kernel's offsets.

    `column_step`: rows must be a multiple of it long. `unit_values`: weights in a unit, the 16 bytes one thread of a
    decode kernel loads. `unit_loads` and `x_loads`: 16-byte loads it takes for a unit's weights and activations.
    """

    name: str
    kind: int
    block_values: int
    block_bytes: int
    planes: tuple[str, ...]
    column_step: int
    unit_values: int
    unit_loads: int
    x_loads: int

    @property
    def bytes_per_value(self) -> float:
        return self.block_bytes / self.block_values

    @property
    def is_float(self) -> bool:
        """Whether decode multiplies float activations rather than int8 ones."""
        return self.block_values == 1


FORMATS: dict[int, Format] = {
    form.kind: form
    for form in (
        Format("F16", 1, 1, 2, ("blocks",), 8, 8, 1, 2),
        Format("Q4_0", 2, 32, 18, ("qs", "d"), 32, 32, 1, 2),
        Format("Q5_0", 6, 32, 22, ("qs", "qh", "d"), 32, 32, 1, 2),
        Format("Q8_0", 8, 32, 34, ("qs", "d"), 32, 16, 1, 1),
        Format("Q4_K", 12, 256, 144, ("blocks",), 256, 32, 2, 2),
        Format("Q5_K", 13, 256, 176, ("blocks",), 256, 32, 3, 2),
        Format("Q6_K", 14, 256, 210, ("ql", "qh", "scales", "d"), 256, 32, 2, 2),
        Format("BF16", 30, 1, 2, ("blocks",), 8, 8, 1, 2),
    )
}
"""By GGML type number. IQ types and MXFP4 are computed on the CPU: lookup tables do not fit these kernels' scheme."""
