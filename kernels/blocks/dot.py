"""Dot product of four int8 pairs packed in int32 words, in the form the target has."""

from __future__ import annotations

import triton
import triton.language as tl

PLAIN = tl.constexpr(0)
DP4A = tl.constexpr(1)
"""NVIDIA from sm_61."""
DOT4 = tl.constexpr(2)
"""AMD CDNA: v_dot4_i32_i8."""
SUDOT4 = tl.constexpr(3)
"""AMD RDNA3 and later: v_dot4_i32_iu8, both operands signed by `neg_lo`."""


@triton.jit
def dot4(a, b, c, FORM: tl.constexpr):
    """`c` plus the sum over the four signed bytes of `a` times those of `b`; all int32, one shape."""
    if FORM == DP4A:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )
    if FORM == DOT4:
        return tl.inline_asm_elementwise(
            "v_dot4_i32_i8 $0, $1, $2, $3", "=v,v,v,v", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )
    if FORM == SUDOT4:
        return tl.inline_asm_elementwise(
            "v_dot4_i32_iu8 $0, $1, $2, $3 neg_lo:[1,1,0]",
            "=v,v,v,v",
            [a, b, c],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    for byte in tl.static_range(4):
        c += ((a << (24 - 8 * byte)) >> 24) * ((b << (24 - 8 * byte)) >> 24)
    return c
