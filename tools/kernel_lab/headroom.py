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

__all__ = ["headroom", "issue_clocks", "tensor_share"]


def issue_clocks(found: Measurement, target: Target) -> float:
    """Clocks in which a core starts one warp's main loop once, by its narrowest way in."""
    loop, warp = found.loop, target.warp_size
    return max(
        loop.all * warp / target.issue_lanes,
        loop.integer * warp / target.integer_lanes,
        loop.conversions * warp / target.slow_lanes,
        loop.wide_loads * warp * 16 / 128 + loop.narrow_loads,  # the L1 cache delivers 128 bytes a clock
    )


def headroom(case: Case, found: Measurement) -> float | None:
    """Return DRAM time over issue time of a decode kernel's main loop; None for a kernel that reads no weights."""
    if not case.work.weight_bytes or case.claims.tensor:
        return None
    target = TARGETS[found.target]
    steps = found.loop.wide_loads / case.claims.wide_loads  # the compiler may have unrolled
    dram = steps * case.work.weight_bytes / target.dram_bytes_per_core_clock
    return dram / (case.num_warps * issue_clocks(found, target))


def tensor_share(case: Case, found: Measurement) -> float | None:
    """Return tensor-core time over the longer of it and issue time of a prefill kernel's step; None for others."""
    if not case.work.tensor_macs:
        return None
    target = TARGETS[found.target]
    tensor = case.work.tensor_macs / target.tensor_macs
    return tensor / max(tensor, case.num_warps * issue_clocks(found, target))
