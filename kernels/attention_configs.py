"""Launch shapes of attention's kernels, by target; no Triton needed. Reasoned and compiled, not measured."""

from __future__ import annotations

from dataclasses import dataclass

from .targets import Target

__all__ = [
    "LOG2_E",
    "AttentionConfig",
    "MergeConfig",
    "attention_config",
    "latent_config",
    "merge_config",
    "num_splits",
]

LOG2_E = 1.4426950408889634
"""Exponents of two are what GPUs compute."""
_MOST_SPLITS = 128


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """A program reads `block` tokens at a time, of `columns` numbers at most, for `heads` query heads together."""

    heads: int
    columns: int
    block: int
    num_warps: int
    num_stages: int


def attention_config(
    target: Target, group: int, width: int, itemsize: int, *, converts: bool = False
) -> AttentionConfig | None:
    """For `group` query heads a key-value head, `width` numbers of `itemsize` bytes each; None where none is known.

    16 KB of keys at a time, half of it in float32, whose products take more registers: more would spill. gfx1100,
    where a warp holds all queries twice, has room for half of that. `converts`: to the query's dtype, for which gfx942
    has no instruction; wide heads in float32 are compiled to something without tensor cores there.
    """
    heads, columns = max(16, _power_of_two(group)), max(16, _power_of_two(width))
    if target.interpreted:
        return AttentionConfig(heads, columns, 64, 1, 1)
    if heads > 16 or columns > 256 or (converts and target.name == "gfx942" and columns > 128 and itemsize == 4):
        return None
    num_bytes = (32 << 10) // itemsize
    if target.name != "gfx1100":
        return AttentionConfig(heads, columns, _block(num_bytes, columns * itemsize), 4, 2)
    if columns > 128 and itemsize == 4:
        return None
    is_wide = columns > 128
    block = _block(num_bytes // 2, columns * itemsize)
    return AttentionConfig(heads, columns, block, 8 if is_wide or itemsize == 4 else 4, 1 if is_wide else 2)


def latent_config(
    target: Target, num_heads: int, rank: int, itemsize: int, *, converts: bool = False
) -> AttentionConfig | None:
    """For latents of `rank` numbers of `itemsize` bytes, which are keys and values at once; None where none is known.

    On gfx1100 every shape spills: a thread would hold 256 registers of queries alone. `converts` as above; beside it
    gfx942 has no registers for two stages.
    """
    columns = max(16, _power_of_two(rank))
    if target.interpreted:
        return AttentionConfig(max(16, _power_of_two(num_heads)), columns, 64, 1, 1)
    is_tight = converts and target.name == "gfx942"
    if target.name == "gfx1100" or columns > 512 or (is_tight and itemsize == 4):
        return None
    return AttentionConfig(16, columns, 32 if itemsize == 2 else 16, 4, 1 if is_tight else 2)


def _block(num_bytes: int, token_bytes: int) -> int:
    return max(16, min(128, num_bytes // token_bytes))


def num_splits(target: Target, num_blocks: int) -> int:
    """Programs for each of `num_blocks` blocks of heads: two a core in all, whatever the length turns out to be."""
    return 3 if target.interpreted else max(1, min(_MOST_SPLITS, 2 * target.num_cores // num_blocks))


@dataclass(frozen=True, slots=True)
class MergeConfig:
    """A program adds up `splits` splits at a time, `columns` numbers of each."""

    splits: int
    columns: int
    num_warps: int


def merge_config(target: Target, width: int) -> MergeConfig:
    """As many threads as columns; a head's answers of one token are few."""
    columns = max(16, _power_of_two(width))
    return MergeConfig(16, columns, 1) if target.interpreted else MergeConfig(16, min(128, columns), 4)


def _power_of_two(number: int) -> int:
    """Not less than `number`."""
    return 1 << (number - 1).bit_length()
