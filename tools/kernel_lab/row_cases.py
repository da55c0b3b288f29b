"""Kernels on rows of floats: norms, rotations, the choice of experts; samples of what models have. And the wait."""

from __future__ import annotations

from collections.abc import Iterator

from hybrimoe_kt.kernels.row_configs import choose_config, logits_config, norm_config, power_of_two, rotate_config
from hybrimoe_kt.kernels.targets import Target

from .cases import Case, Claims, Work

__all__ = ["row_cases"]

_NORMS = (
    ("fp32", 2048, "", False),
    ("fp16", 2048, "", False),
    ("bf16", 2048, "", False),
    ("bf16", 2048, " sum", False),
    ("bf16", 2048, " sum of three", False),
    ("bf16", 128, "", False),
    ("bf16", 256, " plus one", True),
    ("bf16", 7168, "", False),
)
"""Type, width, of which sum; and whether weights are multiplied by before rounding, one added."""
_ROTATIONS = (
    ("fp32", 128, 64, "halves", 0, 0, 0),
    ("bf16", 128, 64, "halves", 0, 0, 0),
    ("bf16", 256, 32, "halves", 0, 0, 0),
    ("bf16", 64, 32, "pairs wide", 1, 1, 1),
    ("bf16", 64, 32, "pairs to halves", 1, 0, 0),
)
"""Type, width of a head, pairs turned, and how; see `kernels.rotate_heads.Rotation`."""
_CHOICES = (
    ("bf16", "128 experts top 8", 128, 8, {"ROUNDED": 2}),
    ("bf16", "512 experts top 10", 512, 10, {"ROUNDED": 2}),
    ("fp32", "64 experts top 6", 64, 6, {"NORMALISES": False}),
    ("fp32", "256 experts top 8 groups", 256, 8, {"SIGMOID": True, "HAS_BIAS": True, "NUM_GROUPS": 8}),
    ("fp32", "160 experts top 6 groups", 160, 6, {"NUM_GROUPS": 8, "OF_TWO": False, "NORMALISES": False}),
    ("bf16", "128 experts ids only", 128, 8, {"WEIGHS": False}),
)


def row_cases(target: Target) -> list[Case]:
    """Return every case of a target, in the order of a layer's launches."""
    return [*_norms(target), *_rotations(target), *_logits(target), *_choices(target), _wait()]


def _norms(target: Target) -> Iterator[Case]:
    for kind, width, of_sum, is_plus_one in _NORMS:
        config, adds = norm_config(target, width), (" sum" in of_sum) + (" three" in of_sum)
        form = (("OFFSET", float(is_plus_one)), ("ROUNDS_FIRST", not is_plus_one), ("ADDS", adds))
        constants = (*form, ("ROWS", config.rows), ("COLUMNS", config.columns))
        pointers = tuple((name, f"*{kind}") for name in ("x", "residual", "more", "weight", "out", "total"))
        arguments = (*pointers, ("epsilon", "fp32"))
        variant, claims = f"{kind} x{width}{of_sum}", Claims(wide_loads=1)
        yield Case("rms_norm", variant, constants, arguments, config.num_warps, 3, claims, Work())


def _rotations(target: Target) -> Iterator[Case]:
    config = rotate_config(target)
    for kind, width, half, name, *flags in _ROTATIONS:
        form = zip(("FROM_PAIRS", "TO_PAIRS", "WIDE"), flags, strict=True)
        rest = power_of_two(width - 2 * half) if width > 2 * half else 0
        shape = (("WIDTH", width), ("HALF", half), ("PAIRS", power_of_two(half)), ("REST", rest))
        pointers = [(pointer, f"*{kind}") for pointer in ("query", "key", "query_out", "key_out")]
        angles = "fp32" if "wide" in name else kind
        pointers += [("cos", f"*{angles}"), ("sin", f"*{angles}")]
        constants = (*shape, *form, ("HEADS", config.heads))
        variant = f"{kind} {name} {2 * half} of {width}"
        yield Case("rotate_heads", variant, constants, tuple(pointers), config.num_warps, 3, Claims(), Work())


def _logits(target: Target) -> Iterator[Case]:
    config = logits_config(target)
    for kind, of_several in (("bf16", False), ("fp32", False), ("bf16", True)):
        pointers = (("x", "*bf16"), ("weight", f"*{kind}"), ("factors", "*bf16"))
        shape, claims = (("ROWS", config.rows), ("COLUMNS", config.columns)), Claims(wide_loads=3)
        constants = (("SEVERAL", of_several), *shape)
        variant = f"bf16 by {kind}{' of several' * of_several}"
        yield Case("router_logits", variant, constants, pointers, config.num_warps, 3, claims, Work())


def _choices(target: Target) -> Iterator[Case]:
    plain = {"SIGMOID": False, "HAS_BIAS": False, "NUM_GROUPS": 1, "BEST_GROUPS": 1, "OF_TWO": True}
    plain |= {"NORMALISES": True, "ROUNDED": 0, "WEIGHS": True}
    for kind, name, num_experts, top_k, changes in _CHOICES:
        form = plain | changes
        form["BEST_GROUPS"] = max(1, form["NUM_GROUPS"] // 2)
        form |= {"TOP_K": top_k, "PLACES": power_of_two(top_k), "GROUPS": power_of_two(form["NUM_GROUPS"])}
        form["MEMBERS"] = power_of_two(num_experts // form["NUM_GROUPS"])
        pointers = (("logits", f"*{kind}"), ("bias", "*fp32"), ("probabilities", "*fp32"))
        arguments = (*pointers, ("least", "fp32"), ("factor", "fp32"))
        num_warps = choose_config(target).num_warps
        yield Case("choose_experts", f"{kind} {name}", tuple(form.items()), arguments, num_warps, 3, Claims(), Work())


def _wait() -> Case:
    pointers = (("words", "*i32"), ("timed_out", "*i32"))
    return Case("wait_word", "int32", (), pointers, 1, 3, Claims(), Work())
