"""Launch shapes of the weighted sum."""

from __future__ import annotations

from dataclasses import dataclass

from hybrimoe_kt.kernels.targets import Target

__all__ = ["CombineConfig", "choose"]


@dataclass(frozen=True, slots=True)
class CombineConfig:
    """A program sums `columns` features of `tokens` tokens."""

    tokens: int
    columns: int
    num_warps: int


def choose(target: Target) -> CombineConfig:
    """Four features a thread: 16-byte loads."""
    if target.interpreted:
        return CombineConfig(tokens=32, columns=512, num_warps=1)
    return CombineConfig(tokens=1, columns=16 * target.warp_size, num_warps=4)
