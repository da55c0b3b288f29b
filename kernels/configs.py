"""Launch shapes of every kernel, by target; no Triton needed."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from .targets import Target

__all__ = [
    "CombineConfig",
    "DecodeConfig",
    "FewConfig",
    "PrefillConfig",
    "QuantizeConfig",
    "SortConfig",
    "combine_config",
    "decode_config",
    "few_config",
    "few_configs",
    "many_config",
    "many_configs",
    "max_blocks",
    "mixture_config",
    "prefill_config",
    "prefill_configs",
    "quantize_config",
    "shares_weights",
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
class FewConfig:
    """As `DecodeConfig`; a program multiplies its rows with `tokens` tokens, for which it unpacks weights once."""

    rows: int
    units: int
    tokens: int
    num_warps: int
    form: int


def few_configs(target: Target) -> tuple[FewConfig, ...]:
    """Every shape: for few rows, for short rows, and for the rest with one token and with several.

    Two rows a thread share the loads of activations: a fifth fewer instructions a weight than with one. More than four
    tokens would leave registers for a few warps only; on sm_120 F16 spills with four.
    """
    lanes, form = target.warp_size, target.dot_form
    if target.interpreted:
        return tuple(FewConfig(512, 32, tokens, 1, form) for tokens in (1, 1, 1, 4))
    return (
        FewConfig(rows=1, units=4 * lanes, tokens=1, num_warps=4, form=form),
        FewConfig(rows=lanes, units=8, tokens=1, num_warps=4, form=form),
        FewConfig(rows=8, units=lanes, tokens=1, num_warps=4, form=form),
        FewConfig(rows=8, units=lanes, tokens=2 if target.name == "sm_120" else 4, num_warps=4, form=form),
    )


_ONE_TOKEN = frozenset((20, 23))
"""IQ4_NL and IQ4_XS: with their tables in registers as well, 8 bytes would spill on sm_80 to sm_90."""


def shares_weights(types: Collection[int]) -> bool:
    """Whether matrices of these types, by GGML's numbers, are unpacked once for several tokens.

    Three loops, one a type, would spill.
    """
    return len(types) < 3 and _ONE_TOKEN.isdisjoint(types)


def few_config(target: Target, num_rows: int, num_units: int, num_tokens: int) -> FewConfig:
    """Choose for `num_rows` rows in all, of at most `num_units` units each; reasoned, not measured.

    - A warp with a row to itself leaves lanes idle where rows are short. Those that idle for a quarter of the time are
      worth a shape without several tokens if there is one only, and if its larger programs still are four a core.
    - With fewer than 32 rows a core too little of the matrix would be requested at once. Four warps a row request all
      of a long row, but share nothing between tokens, so these count as rows.
    """
    narrow, short, one, several = few_configs(target)
    lanes = target.warp_size
    is_idle = 4 * num_units <= 3 * lanes * -(-num_units // lanes)
    is_filled = num_rows >= 4 * short.rows * target.num_cores
    if 4 * num_units <= lanes or (num_tokens == 1 and (2 * num_units <= lanes or (is_idle and is_filled))):
        return short
    if num_rows * num_tokens < 32 * target.num_cores and num_units > 2 * lanes:
        return narrow
    return one if num_tokens == 1 else several


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

    There Q3_K with Q6_K spills 8 bytes in two stages, Q4_K with Q5_0 as many in one; on sm_86 Q5_1 with Q5_K and Q6_K
    with IQ3_S do. Not every mixture was compiled.
    """
    small = prefill_configs(target)[0]
    return small if target.name == "sm_80" else replace(small, num_stages=1)


def prefill_config(target: Target, pairs_per_expert: float, *, one_type: bool = True) -> PrefillConfig:
    """The larger block where experts have the tokens to fill it."""
    if not one_type:
        return mixture_config(target)
    return prefill_configs(target)[-1 if pairs_per_expert >= 48 else 0]


_LARGE = PrefillConfig(rows=128, pairs=128, num_warps=8, num_stages=2)
_MANY: dict[str, PrefillConfig] = {
    "sm_80": _LARGE,
    "sm_90": _LARGE,
    "sm_100": _LARGE,
    "gfx942": _LARGE,
    "interpreter": PrefillConfig(512, 16, 1, 1),
}
"""The larger block of linear_many, `pairs` being tokens, where it is not `_COMMON_MANY`. With one matrix a block of 128
tokens fits, which doubles the tensor cores' share of what experts' 64 reach; elsewhere 64 suffice."""
_COMMON_MANY = PrefillConfig(rows=128, pairs=64, num_warps=8, num_stages=2)


def many_configs(target: Target) -> tuple[PrefillConfig, ...]:
    """Both shapes of linear_many, smaller block first."""
    large = replace(_MANY.get(target.name, _COMMON_MANY), form=target.dot_form)
    small = prefill_configs(target)[0]
    return (small,) if small == large else (small, large)


def many_config(target: Target, num_heads: int, num_rows: int, num_tokens: int) -> PrefillConfig:
    """The larger block where heads of `num_rows` rows, and the tokens, make one for every core, none half empty."""
    large = many_configs(target)[-1]
    num_blocks = num_heads * -(-num_rows // large.rows) * -(-num_tokens // large.pairs)
    is_filled = num_blocks >= target.num_cores and 2 * num_rows > large.rows
    return large if is_filled else many_configs(target)[0]


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
