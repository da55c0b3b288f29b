"""Launch shapes of the decode kernels, by weight type and target."""

from __future__ import annotations

from dataclasses import dataclass

from hybrimoe_kt.kernels.targets import Target

__all__ = ["DecodeConfig", "choose"]


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """A program computes `rows` rows, `units` units of 16 weight bytes of each at a time; `form` is the dot product's.

    One warp a row and one unit a thread keep everything but the last sum inside a thread.
    """

    rows: int
    units: int
    num_warps: int
    form: int


def choose(target: Target) -> DecodeConfig:
    """A row per warp: as many units a row as a warp has threads, so that a warp reads 512 consecutive bytes or more."""
    if target.interpreted:
        return DecodeConfig(rows=512, units=32, num_warps=1, form=target.dot_form)
    return DecodeConfig(rows=4, units=target.warp_size, num_warps=4, form=target.dot_form)
