"""GGML's type numbers as constants that compiled code can see."""

from __future__ import annotations

import triton.language as tl

F16 = tl.constexpr(1)
Q4_0 = tl.constexpr(2)
Q5_0 = tl.constexpr(6)
Q8_0 = tl.constexpr(8)
Q4_K = tl.constexpr(12)
Q5_K = tl.constexpr(13)
Q6_K = tl.constexpr(14)
BF16 = tl.constexpr(30)
