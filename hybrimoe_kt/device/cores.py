"""How many threads may compute: the machine's physical cores, shared out so that two pools never fight.

ggml's threads sleep between calls, so experts and dense layers share them. kt-kernel keeps its compute threads and one
queue thread spinning for 50 ms after each call, which is longer than the time between two MoE layers: while a model
runs, those cores are taken.
"""

from __future__ import annotations

import os
import sys

__all__ = [
    "default_expert_threads",
    "dense_threads",
    "has_core_to_spare",
    "let_idle_threads_sleep",
    "physical_cores",
    "spinning_threads",
]

_HOSTS_CORES = 2

_SPARE_FROM = 8
"""Cores from which one that only polls is not missed: experts' threads have half of them, torch the rest. Estimated."""


def physical_cores() -> int:
    """Cores this process may run on, hyper-threads counted once."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        import cpufeature

        physical = int(cpufeature.CPUFeature["num_physical_cores"])
        logical = int(cpufeature.CPUFeature["num_virtual_cores"])
    except (ImportError, KeyError, ValueError, OSError):
        return max(1, allowed)
    if not 0 < physical <= logical:  # some virtual machines report nonsense
        return max(1, allowed)
    return max(1, allowed * physical // logical)


def default_expert_threads(*, beside_accelerator: bool = False) -> int:
    """Threads for CPU experts: all cores where experts and dense layers take turns, all but two beside an accelerator.

    Two are the host's there: one that plans and launches, one for the driver.
    """
    return max(1, physical_cores() - _HOSTS_CORES) if beside_accelerator else physical_cores()


def spinning_threads() -> int:
    """Threads for a pool that spins between calls, kt-kernel's: half the cores, at least one; the rest is torch's.

    One on a 2-core machine, where two were measured to make a small call take 8-20 ms instead of 30 us.
    """
    return max(1, physical_cores() // 2)


def let_idle_threads_sleep() -> None:
    """Keep OpenMP's idle threads, torch's, from spinning on cores that experts want; no effect once torch is loaded.

    A choice of the user's own stays.
    """
    if "torch" not in sys.modules:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def has_core_to_spare() -> bool:
    """Whether the host may poll without sleeping."""
    return physical_cores() >= _SPARE_FROM


def dense_threads(expert_threads: int) -> int:
    """Threads left for torch's own dense arithmetic beside `expert_threads` that spin."""
    return max(1, physical_cores() - expert_threads)
