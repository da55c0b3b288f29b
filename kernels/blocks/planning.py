"""What kernels that plan share: the rules of `hybrimoe_kt.core.device_rules`, a piece each."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["NOWHERE", "cut_of", "faded", "least", "shares_of"]

NOWHERE = tl.constexpr((1 << 31) - 1)
"""Worth of a slot that may not be given away; more than any score."""


@triton.jit
def shares_of(probabilities):
    """Multiples of 2^-24, rounded down; what is no number counts as 0."""
    known = tl.where(probabilities == probabilities, probabilities, 0.0)
    return (tl.minimum(tl.maximum(known, 0.0), 1.0) * 16777216.0).to(tl.int32)


@triton.jit
def cut_of(shares, KEPT: tl.constexpr, EXPERTS: tl.constexpr):
    """A number that the KEPT highest of `shares [EXPERTS]` reach, all that equal the lowest of these, and no other.

    That lowest one bit by bit, from the highest on; done as soon as KEPT shares reach what is known of it.
    """
    cut, unit, count = 0, 1 << 24, -1
    while (unit > 0) & (count != KEPT):
        count = EXPERTS + tl.sum((shares - cut - unit) >> 31, axis=0)  # signs: comparisons would be packed and unpacked
        cut += tl.where(count >= KEPT, unit, 0)
        unit = unit >> 1
    return cut


@triton.jit
def faded(score, share, ALPHA: tl.constexpr):
    """One step of an average: shares are multiples of 2^-24, scores of 2^-30, ALPHA of 2^-16."""
    lost = (score.to(tl.int64) * ALPHA) >> 16
    return (score - lost + ((share.to(tl.int64) * ALPHA) >> 10)).to(tl.int32)


@triton.jit
def least(worth, slot):
    """The lowest worth, and the lowest slot that has it."""
    lowest = tl.min(worth, axis=0)
    return lowest, tl.min(tl.where(worth == lowest, slot, NOWHERE), axis=0)
