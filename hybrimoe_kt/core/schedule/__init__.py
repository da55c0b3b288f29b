"""Who computes what: the schedulers by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrimoe_kt.core.registry import find

from .balanced import BalancedScheduler
from .baselines import (
    CpuOnlyScheduler,
    FiddlerScheduler,
    GpuOnlyScheduler,
    LayerSplitScheduler,
    OneRatioScheduler,
    StaticScheduler,
)
from .paper import PaperScheduler
from .scheduler import Scheduler

__all__ = ["SCHEDULERS", "Scheduler", "make_scheduler"]

SCHEDULERS: Mapping[str, type[Scheduler]] = {
    cls.name: cls
    for cls in (
        BalancedScheduler,
        PaperScheduler,
        FiddlerScheduler,
        OneRatioScheduler,
        StaticScheduler,
        LayerSplitScheduler,
        GpuOnlyScheduler,
        CpuOnlyScheduler,
    )
}


def make_scheduler(name: str, options: Mapping[str, Any]) -> Scheduler:
    """Return the scheduler `name` (or at a dotted path) with `options`."""
    return find("scheduler", name, SCHEDULERS, Scheduler)(**options)
