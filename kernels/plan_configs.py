"""Launch shapes of the kernels that plan and of those that bring experts, by target; no Triton needed."""

from __future__ import annotations

from dataclasses import dataclass

from .targets import Target

__all__ = ["FetchConfig", "PlanConfig", "WaitConfig", "fetch_config", "plan_config", "wait_config"]


@dataclass(frozen=True, slots=True)
class PlanConfig:
    """One program plans a layer's step; it posts `words` words of 4 bytes at a time."""

    num_warps: int
    words: int


def plan_config(target: Target, num_experts: int) -> PlanConfig:
    """One warp: a step is a chain of reductions, which then need no shared memory; see `tools.kernel_lab.plan_time`.

    The tables of more than 256 experts do not fit into its registers.
    """
    return PlanConfig(num_warps=1 if num_experts <= 256 else 4, words=1024)


@dataclass(frozen=True, slots=True)
class FetchConfig:
    """`programs` share an expert's bytes, `words` words of 4 bytes at a time each."""

    programs: int
    words: int
    num_warps: int


def fetch_config(target: Target) -> FetchConfig:
    """Four loads of 16 bytes a thread under way, 256 KB in all: a link of 32 GB/s has 64 KB in flight in 2 us.

    Few programs, for the other cores to compute meanwhile.
    """
    if target.interpreted:
        return FetchConfig(programs=2, words=1024, num_warps=1)
    return FetchConfig(programs=8, words=16 * 16 * target.warp_size, num_warps=16)


@dataclass(frozen=True, slots=True)
class WaitConfig:
    """`polls`: how often memory is looked at before waiting is given up."""

    polls: int


def wait_config(target: Target) -> WaitConfig:
    """Seconds: a look takes half a microsecond and more."""
    return WaitConfig(polls=1000 if target.interpreted else 1 << 22)
