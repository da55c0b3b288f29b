"""Launch shapes of every kernel, by target; no Triton needed."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .targets import Target

__all__ = [
    "CombineConfig",
    "DecodeConfig",
    "PrefillConfig",
    "QuantizeConfig",
    "SortConfig",
    "combine_config",
    "decode_config",
    "max_blocks",
    "mixture_config",
    "prefill_config",
    "prefill_configs",
    "quantize_config",
    "sort_config",
]


@dataclass(frozen=True, slots=True)
class QuantizeConfig:
    """`blocks`: blocks of 32 values a program."""

    blocks: int
    num_warps: int


def quantize_config(target: Target) -> QuantizeConfig:
    """Small programs: at decode there are few values, and the kernel's time is its launch."""
    return QuantizeConfig(blocks=1024, num_warps=1) if target.interpreted else QuantizeConfig(blocks=32, num_warps=4)


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """A program computes `rows` rows, `units` units of 16 weight bytes of each at a time; `form` is the dot product's.

    One warp a row and one unit a thread keep everything but the last sum inside a thread.
    """

    rows: int
    units: int
    num_warps: int
    form: int


def decode_config(target: Target) -> DecodeConfig:
    """A row per warp: as many units a row as a warp has threads, so that a warp reads 512 consecutive bytes or more."""
    if target.interpreted:
        return DecodeConfig(rows=512, units=32, num_warps=1, form=target.dot_form)
    return DecodeConfig(rows=4, units=target.warp_size, num_warps=4, form=target.dot_form)


@dataclass(frozen=True, slots=True)
class SortConfig:
    """`chunk`: pairs a program looks at together."""

    chunk: int
    num_warps: int


def sort_config(target: Target) -> SortConfig:
    """Every program reads every pair, from the L2 cache: large chunks, few rounds."""
    return SortConfig(chunk=1024, num_warps=4)


def max_blocks(num_pairs: int, num_experts: int, block_pairs: int) -> int:
    """Blocks that suffice whatever the routing: full ones, and one that is not full for each expert."""
    return num_pairs // block_pairs + min(num_experts, num_pairs)


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """A program computes `rows` output features of one expert for a block of `pairs` (token, expert) pairs.

    `form` is that of the target's byte permutation, the dot product's.
    """

    rows: int
    pairs: int
    num_warps: int
    num_stages: int
    form: int = 0


_SHAPES: dict[str, tuple[PrefillConfig, ...]] = {
    "sm_80": (PrefillConfig(64, 32, 4, 2), PrefillConfig(128, 64, 8, 2)),
    "sm_90": (PrefillConfig(64, 32, 4, 2), PrefillConfig(128, 64, 8, 2)),
    "sm_100": (PrefillConfig(64, 32, 4, 2), PrefillConfig(128, 64, 8, 2)),
    "gfx942": (PrefillConfig(128, 32, 4, 2), PrefillConfig(128, 64, 4, 2)),
    "gfx1100": (PrefillConfig(64, 16, 4, 2),),
    "interpreter": (PrefillConfig(512, 16, 1, 1),),
}
"""What differs from `_COMMON`, smaller block first. Found by compiling, not by running (docs/kernels-table.md): where
tensor cores are fast, 64 pairs halve the dequantising that keeps them waiting; 32 pairs spill on gfx1100; 64 rows
would be 8 bytes a thread of gfx942's wide warps."""
_COMMON = (PrefillConfig(rows=64, pairs=32, num_warps=4, num_stages=2),)


def prefill_configs(target: Target) -> tuple[PrefillConfig, ...]:
    """Every shape for gate and up of one type, and for down, smaller block first."""
    shapes = _SHAPES.get(target.name, _COMMON)
    return tuple(replace(shape, form=target.dot_form) for shape in shapes)


def mixture_config(target: Target) -> PrefillConfig:
    """For gate and up of two types, a loop each: one stage, which spills least, or two on sm_80.

    There Q3_K with Q6_K spills 8 bytes in two stages, Q4_K with Q5_0 as many in one; on sm_86 Q5_1 with Q5_K does.
    """
    small = prefill_configs(target)[0]
    return small if target.name == "sm_80" else replace(small, num_stages=1)


def prefill_config(target: Target, pairs_per_expert: float, *, one_type: bool = True) -> PrefillConfig:
    """The larger block where experts have the tokens to fill it."""
    if not one_type:
        return mixture_config(target)
    return prefill_configs(target)[-1 if pairs_per_expert >= 48 else 0]


@dataclass(frozen=True, slots=True)
class CombineConfig:
    """A program sums `columns` features of `tokens` tokens."""

    tokens: int
    columns: int
    num_warps: int


def combine_config(target: Target) -> CombineConfig:
    """Four features a thread: 16-byte loads."""
    if target.interpreted:
        return CombineConfig(tokens=32, columns=512, num_warps=1)
    return CombineConfig(tokens=1, columns=16 * target.warp_size, num_warps=4)
