"""Launch shapes of the kernels that work on rows of floats: norms, rotations, the choice of experts."""

from __future__ import annotations

from dataclasses import dataclass

from .targets import Target

__all__ = [
    "MOST_CHOSEN",
    "MOST_COLUMNS",
    "MOST_EXPERTS",
    "ChooseConfig",
    "LogitsConfig",
    "NormConfig",
    "RotateConfig",
    "choose_config",
    "logits_config",
    "norm_config",
    "power_of_two",
    "rotate_config",
]

MOST_COLUMNS, MOST_EXPERTS, MOST_CHOSEN = 8192, 512, 16
"""Of a row that is held in registers, of a router, and of those it chooses."""
_TILE = 1024


def power_of_two(size: int) -> int:
    """The least that is not below `size`."""
    return 1 << max(size - 1, 0).bit_length()


@dataclass(frozen=True, slots=True)
class NormConfig:
    """A program normalises `rows` rows of up to `columns` values."""

    rows: int
    columns: int
    num_warps: int


def norm_config(target: Target, width: int) -> NormConfig:
    """Eight values a thread, 16 bytes of halves; heads share a program, wide rows have more threads."""
    columns = power_of_two(width)
    if target.interpreted:
        return NormConfig(rows=64, columns=columns, num_warps=1)
    rows = max(1, _TILE // columns)
    return NormConfig(rows, columns, num_warps=max(1, min(8, rows * columns // (8 * target.warp_size))))


@dataclass(frozen=True, slots=True)
class RotateConfig:
    """A program rotates `heads` heads of one token."""

    heads: int
    num_warps: int


def rotate_config(target: Target) -> RotateConfig:
    """At decode there is one token: small programs, for several cores to share its heads."""
    return RotateConfig(heads=64, num_warps=1) if target.interpreted else RotateConfig(heads=4, num_warps=1)


@dataclass(frozen=True, slots=True)
class ChooseConfig:
    """A program chooses for one token."""

    num_warps: int


def choose_config(target: Target) -> ChooseConfig:
    """One warp: its reductions need no shared memory, and there are three for each expert chosen."""
    return ChooseConfig(num_warps=1)


@dataclass(frozen=True, slots=True)
class LogitsConfig:
    """A program multiplies `rows` experts' weights by one token's states, `columns` at a time."""

    rows: int
    columns: int
    num_warps: int


def logits_config(target: Target) -> LogitsConfig:
    """Two rows share the loads of states; 64 experts or more are 32 programs at least."""
    if target.interpreted:
        return LogitsConfig(rows=128, columns=256, num_warps=1)
    return LogitsConfig(rows=2, columns=32 * target.warp_size, num_warps=4)
