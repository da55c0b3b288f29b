"""How much device memory a lane takes beside slots and the kernels' workspace, known before it is made."""

from __future__ import annotations

from collections.abc import Collection

from .experts import LayerExperts
from .layout import SlotLayout
from .readback import MAX_GUESSES

__all__ = ["lane_bytes"]


def lane_bytes(
    layers: Collection[LayerExperts], max_tokens: int, *, gpu_answers_pairs: bool, cpu_answers_pairs: bool
) -> int:
    """An upper bound for `Lane`'s sums and answers, guesses, tables, and the places where transfers land."""
    if not layers:
        return 0
    hidden, top_k = max(each.hidden for each in layers), max(each.top_k for each in layers)
    num_experts = max(each.num_experts for each in layers)
    answers = 1 + (top_k if gpu_answers_pairs else 1) + (top_k if cpu_answers_pairs else 1)
    routed, scored = max_tokens * top_k * 8, num_experts * 4
    layouts = [SlotLayout(each) for each in layers]
    landing = 2 * max((layout.slot_bytes for layout in layouts if not layout.is_file_order), default=0)
    tables = 4 * num_experts * num_experts + 12 * len(layers) * num_experts
    return max_tokens * (hidden * answers + top_k) * 4 + MAX_GUESSES * (routed + scored) + landing + tables
