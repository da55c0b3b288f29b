"""Kernels that plan and bring experts; samples of what models have."""

from __future__ import annotations

from collections.abc import Iterator

from hybrimoe_kt.kernels.plan_configs import fetch_config, plan_config
from hybrimoe_kt.kernels.row_configs import power_of_two
from hybrimoe_kt.kernels.targets import Target

from .cases import Case, Claims, Work

__all__ = ["plan_cases", "plan_step_case"]

_STATE = ("slot_of", "expert_of", "scores", "issued", "landed", "counts", "totals", "record")
_OF_STEP = ("table", "visits", "hits", "misses", "resident", "late", "copies", "on_cpu", "asked", "done")
_OF_MODEL = ("tables", "gains", "slot_counts", "class_of", "copies_out", "timed_out")
_POINTERS = (
    *((name, "*i32") for name in (*_STATE, *_OF_STEP, *_OF_MODEL, "hidden", "inbox")),
    *((name, "*i64") for name in ("ids", "posted_ids", "sources", "targets", "slot_bytes")),
    *((name, "*fp32") for name in ("weights", "posted_weights", "probabilities")),
)
_STEPS = (
    ("128 experts top 8", 128, 8, 64, {}),
    ("128 experts top 8 bypass", 128, 8, 64, {"BYPASS": True}),
    ("256 experts top 10", 256, 10, 256, {}),
    ("512 experts top 10", 512, 10, 512, {}),
    ("8 experts top 2", 8, 2, 3, {}),
    ("128 experts top 8 LRU", 128, 8, 64, {"LRU": True}),
    ("128 experts top 8 unasked", 128, 8, 64, {"POSTS": False}),
)
"""Name, experts, top-k, slots, and what differs from the usual."""


def plan_cases(target: Target) -> list[Case]:
    """Return every case of a target, in the order of a layer's launches."""
    return [*_steps(target), *_ahead(target), *_fetches(target), *_words()]


def plan_step_case(
    num_experts: int, top_k: int, num_slots: int, kept: int, hidden_bytes: int, num_warps: int, **changes: bool
) -> Case:
    """A step's plan for a layer of that shape."""
    form = {"LRU": False, "ALPHA": 1966, "KEPT": kept, "BYPASS": False, "POSTS": True} | changes
    form |= {"NUM_EXPERTS": num_experts, "TOP_K": top_k, "EXPERTS": max(32, power_of_two(num_experts))}
    form |= {"PLACES": max(8, power_of_two(top_k)), "SLOTS": max(32, power_of_two(num_slots))}
    constants = (*form.items(), ("NUM_WORDS", hidden_bytes // 4), ("WORDS", 1024))
    return Case("plan_step", f"{num_experts} experts", constants, _POINTERS, num_warps, 3, Claims(), Work())


def _steps(target: Target) -> Iterator[Case]:
    for name, num_experts, top_k, num_slots, changes in _STEPS:
        num_warps = plan_config(target, num_experts).num_warps
        case = plan_step_case(num_experts, top_k, num_slots, min(num_experts, 2 * top_k), 4096, num_warps, **changes)
        yield Case(case.op, name, case.constants, case.pointers, case.num_warps, 3, Claims(), Work())


def _ahead(target: Target) -> Iterator[Case]:
    for name, num_experts, top_k, slots, prefetch in (
        ("128 experts top 8", 128, 8, 64, 1),
        ("256 experts top 10", 256, 10, 256, 3),
    ):
        shape = {"NUM_EXPERTS": num_experts, "TOP_K": top_k, "PREFETCH": prefetch, "ADMISSION": True}
        shape |= {"PLACES": max(8, power_of_two(top_k)), "SLOTS": slots, "ROWS": power_of_two(prefetch)}
        num_warps = plan_config(target, num_experts).num_warps
        yield Case("look_ahead", name, tuple(shape.items()), _POINTERS, num_warps, 3, Claims(), Work())


def _fetches(target: Target) -> Iterator[Case]:
    config = fetch_config(target)
    for name, is_layered in (("one layer", False), ("of layers", True)):
        constants, claims = (("LAYERED", is_layered), ("WORDS", config.words)), Claims(wide_loads=4)
        yield Case("fetch", name, constants, _POINTERS, config.num_warps, 3, claims, Work())
        constants = (("LAYERED", is_layered), ("COPIES", 8))
        yield Case("land", name, constants, _POINTERS, 1, 3, Claims(), Work())


def _words() -> Iterator[Case]:
    constants = (("TOP_K", 8), ("PLACES", 8))
    yield Case("wait_landed", "top 8", constants, _POINTERS, 1, 3, Claims(), Work())
