"""What a stock norm or rotation does exactly, found out by asking it: in bfloat16, where every rounding shows."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional

from hybrimoe_kt.kernels.row_forms import Rotation

__all__ = ["NormForm", "is_torchs_norm", "norm_form", "rotation_of"]

_WIDTH = 64
Norm = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From `x [..., W]` and weights `[W]` to the norm, of the same dtype."""


class NormForm(NamedTuple):
    """See `kernels.rms_norm`."""

    offset: float
    rounds_first: bool


@torch.no_grad()
def norm_form(stock: Norm, epsilon: float) -> NormForm | None:
    """The form that has the same bits; None where none known here has. Wants Triton installed."""
    from hybrimoe_kt.kernels.rms_norm import naive_rms_norm

    given, weight = (values.bfloat16() for values in _asked())
    wanted = stock(given, weight)
    for form in itertools.starmap(NormForm, itertools.product((0.0, 1.0), (True, False))):
        if torch.equal(naive_rms_norm(given, weight, epsilon, **form._asdict()), wanted):
            return form
    return None


@torch.no_grad()
def is_torchs_norm(stock: Norm, epsilon: float) -> bool:
    """Whether torch's own function has the same bits in float32."""
    given, weight = _asked()
    return torch.equal(functional.rms_norm(given, weight.shape, weight, epsilon), stock(given, weight))


def _asked() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows so small that epsilon shows, and weights."""
    random = torch.Generator(device="cpu").manual_seed(20250405)
    given = torch.randn(_WIDTH, _WIDTH, generator=random, device="cpu") * 1e-3
    return given, torch.randn(_WIDTH, generator=random, device="cpu")


@functools.cache
@torch.no_grad()
def rotation_of(stock: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> Rotation | None:
    """What a family's `apply_rotary_pos_emb` does; None where no rotation known here has the same bits."""
    from hybrimoe_kt.kernels.rotate_heads import naive_rotate_heads

    random, half = torch.Generator(device="cpu").manual_seed(20250405), torch.bfloat16
    query, key = (torch.randn(1, heads, 5, 32, generator=random, device="cpu").to(half) for heads in (3, 2))
    angles = torch.randn(1, 5, 16, generator=random, device="cpu")
    for kind in (half, torch.float32):  # families whose angles stay float32 would widen what is turned by others
        cos, sin = angles.cos().to(kind), angles.sin().to(kind)
        wanted = stock(query, key, cos.repeat(1, 1, 2), sin.repeat(1, 1, 2))
        for flags in itertools.product((False, True), repeat=3):
            rotation = Rotation(*flags)
            found = [naive_rotate_heads(x, cos[:, None], sin[:, None], rotation) for x in (query, key)]
            if all(map(torch.equal, found, wanted)):
                return rotation
    return None
