"""Launch shapes of the pair sorting."""

from __future__ import annotations

from dataclasses import dataclass

from hybrimoe_kt.kernels.targets import Target

__all__ = ["SortConfig", "choose", "max_blocks"]


@dataclass(frozen=True, slots=True)
class SortConfig:
    """`chunk`: pairs a program looks at together."""

    chunk: int
    num_warps: int


def choose(target: Target) -> SortConfig:
    """Every program reads every pair, from the L2 cache: large chunks, few rounds."""
    return SortConfig(chunk=1024, num_warps=4)


def max_blocks(num_pairs: int, num_experts: int, block_pairs: int) -> int:
    """Blocks that suffice whatever the routing: full ones, and one that is not full for each expert."""
    return num_pairs // block_pairs + min(num_experts, num_pairs)
