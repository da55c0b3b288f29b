"""How far a kernel's instructions stay below its memory traffic: arithmetic on counts, not a measurement.

A decode kernel keeps up with DRAM if a core issues one step's instructions in less time than its share of DRAM takes
to deliver the step's weights. The ratio is the *headroom*; below 1 the arithmetic is the bottleneck. A prefill
kernel should be bounded by its tensor cores; the *tensor share* is their time over that of everything issued.
Latencies, bank conflicts and cache misses are not in it, so both are upper bounds of what a GPU will show.
"""

from __future__ import annotations

from hybrimoe_kt.kernels.targets import TARGETS, Target

from .build import Measurement
from .cases import Case

__all__ = ["headroom", "issue_clocks", "look_up_clocks", "tensor_share"]


def look_up_clocks(target: Target, num_bytes: int) -> float:
    """Clocks the L1 cache takes for a warp that loads `num_bytes` a thread, 4 or 8, from random places of a table.

    NVIDIA: as many as requests meet in the fullest of 32 banks of 4 bytes, by drawing 3.5 for a warp, and twice 3.1
    for 8 bytes, half a warp at a time; the tags of the 8 to 64 lines, four a clock, take no longer. AMD: four
    addresses a clock.
    """
    if target.backend == "hip":
        return target.warp_size / 4
    return 3.5 if num_bytes == 4 else 6.2


def issue_clocks(found: Measurement, target: Target, more_clocks: float = 0.0) -> float:
    """Clocks in which a core starts one warp's main loop once, by its narrowest way in.

    `more_clocks`: what the L1 cache takes for look-ups beyond one clock each.
    """
    loop, warp = found.loop, target.warp_size
    return max(
        loop.all * warp / target.issue_lanes,
        loop.integer * warp / target.integer_lanes,
        loop.conversions * warp / target.slow_lanes,
        loop.wide_loads * warp * 16 / 128 + loop.narrow_loads + more_clocks,  # the L1 cache delivers 128 bytes a clock
    )


def headroom(case: Case, found: Measurement) -> float | None:
    """Return DRAM time over issue time of a decode kernel's main loop; None for a kernel that reads no weights."""
    if not case.work.weight_bytes or case.work.tensor_macs:
        return None
    target = TARGETS[found.target]
    steps = found.loop.wide_loads / case.claims.wide_loads  # the compiler may have unrolled
    dram = steps * case.work.weight_bytes / target.dram_bytes_per_core_clock
    return dram / (case.num_warps * issue_clocks(found, target, steps * _more_clocks(case, target)))


def tensor_share(case: Case, found: Measurement) -> float | None:
    """Return tensor-core time over the longer of it and issue time of a prefill kernel's step; None for others."""
    if not case.work.tensor_macs:
        return None
    target = TARGETS[found.target]
    tensor = case.work.tensor_macs / target.tensor_macs
    return tensor / max(tensor, case.num_warps * issue_clocks(found, target, _more_clocks(case, target)))


def _more_clocks(case: Case, target: Target) -> float:
    return case.work.look_ups * (look_up_clocks(target, case.work.look_up_bytes) - 1)
