"""Launch shapes of the grouped matrix products, by weight type and target."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hybrimoe_kt.kernels.targets import Target

__all__ = ["PrefillConfig", "choose", "configs"]


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """A program computes `rows` output features of one expert for a block of `pairs` (token, expert) pairs."""

    rows: int
    pairs: int
    num_warps: int
    num_stages: int


_SMALL = PrefillConfig(rows=64, pairs=32, num_warps=4, num_stages=2)
_LARGE = PrefillConfig(rows=64, pairs=64, num_warps=8, num_stages=2)
# Found by compiling, not by running: with 64 pairs these need 200 registers and more a thread (docs/kernels.md).
_ONLY_SMALL = frozenset({"sm_80", "sm_86", "sm_89", "sm_120", "gfx1100"})
# With two stages the 32-pair form spills there.
_ONE_STAGE = frozenset({"gfx1100"})


def configs(target: Target) -> tuple[PrefillConfig, ...]:
    """Every shape that `choose` can return for a target."""
    if target.interpreted:
        return (PrefillConfig(rows=512, pairs=16, num_warps=1, num_stages=1),)
    small = replace(_SMALL, num_stages=1) if target.name in _ONE_STAGE else _SMALL
    return (small,) if target.name in _ONLY_SMALL else (small, _LARGE)


def choose(target: Target, pairs_per_expert: float) -> PrefillConfig:
    """Blocks of 64 pairs where the registers allow it and experts have enough tokens to fill them."""
    shapes = configs(target)
    return shapes[-1] if pairs_per_expert >= 48 else shapes[0]
