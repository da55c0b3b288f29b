"""Reasons to reject a compiled kernel."""

from __future__ import annotations

from collections.abc import Iterator

from hybrimoe_kt.kernels.targets import TARGETS

from .build import Measurement
from .cases import Case

__all__ = ["rejections"]


def rejections(case: Case, found: Measurement) -> list[str]:
    """Return what is wrong with a case, one sentence each; empty means accepted."""
    return [f"{found.target} {case.name}: {reason}" for reason in _reasons(case, found)]


def _reasons(case: Case, found: Measurement) -> Iterator[str]:
    target, claims, loop = TARGETS[found.target], case.claims, found.loop
    if found.resources.spilled_bytes:
        yield f"spills {found.resources.spilled_bytes} bytes of registers; use fewer rows, pairs or stages"
    if found.shared_bytes > target.shared_bytes:
        yield f"needs {found.shared_bytes} bytes of shared memory, {target.shared_bytes} are there; use fewer stages"
    if loop.wide_loads < claims.wide_loads:
        yield f"has {loop.wide_loads} 16-byte loads in its main loop, {claims.wide_loads} are claimed"
    if claims.tensor and not loop.tensor:
        yield "has no tensor-core instruction in its main loop"
    if claims.dot and target.dot_form and not loop.dot:
        yield "has no dot-product instruction in its main loop"
    steps = max(loop.wide_loads // claims.wide_loads, 1) if claims.wide_loads and not claims.tensor else 1
    if claims.max_narrow_loads is not None and loop.narrow_loads > claims.max_narrow_loads * steps:
        allowed = claims.max_narrow_loads * steps
        yield f"has {loop.narrow_loads} loads under 16 bytes in its main loop, {allowed} are allowed"
    if (claims.tensor or claims.dot) and loop.conversions > claims.max_conversions * steps:
        allowed = claims.max_conversions * steps
        yield f"converts between int and float {loop.conversions} times in its main loop, {allowed} are allowed"
