"""Launch shapes of the activation quantiser."""

from __future__ import annotations

from dataclasses import dataclass

from hybrimoe_kt.kernels.targets import Target

__all__ = ["QuantizeConfig", "choose"]


@dataclass(frozen=True, slots=True)
class QuantizeConfig:
    """`blocks`: blocks of 32 values a program."""

    blocks: int
    num_warps: int


def choose(target: Target) -> QuantizeConfig:
    """Small programs: at decode there are few values, and the kernel's time is its launch."""
    return QuantizeConfig(blocks=1024, num_warps=1) if target.interpreted else QuantizeConfig(blocks=32, num_warps=4)
