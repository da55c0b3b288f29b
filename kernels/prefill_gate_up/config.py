"""Launch shapes of the grouped matrix products, by weight type and target."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hybrimoe_kt.kernels.targets import Target

__all__ = ["PrefillConfig", "choose", "configs", "mixture_config"]


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """A program computes `rows` output features of one expert for a block of `pairs` (token, expert) pairs."""

    rows: int
    pairs: int
    num_warps: int
    num_stages: int


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


def configs(target: Target) -> tuple[PrefillConfig, ...]:
    """Every shape for gate and up of one type, and for down, smaller block first."""
    return _SHAPES.get(target.name, _COMMON)


def mixture_config(target: Target) -> PrefillConfig:
    """For gate and up of two types, a loop each: in one stage, or on sm_80 in two, none of them spills."""
    small = configs(target)[0]
    return small if target.name == "sm_80" else replace(small, num_stages=1)


def choose(target: Target, pairs_per_expert: float, *, one_type: bool = True) -> PrefillConfig:
    """The larger block where experts have the tokens to fill it."""
    if not one_type:
        return mixture_config(target)
    return configs(target)[-1 if pairs_per_expert >= 48 else 0]
