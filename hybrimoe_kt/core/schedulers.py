"""The schedulers by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrimoe_kt.core.balanced import BalancedScheduler
from hybrimoe_kt.core.greedy import PaperScheduler
from hybrimoe_kt.core.scheduler import (
    CpuOnlyScheduler,
    FiddlerScheduler,
    GpuOnlyScheduler,
    LayerSplitScheduler,
    Scheduler,
    StaticScheduler,
)
from hybrimoe_kt.errors import ConfigError, unknown_name

__all__ = ["SCHEDULERS", "make_scheduler"]

SCHEDULERS: Mapping[str, type[Scheduler]] = {
    cls.name: cls
    for cls in (
        BalancedScheduler,
        PaperScheduler,
        FiddlerScheduler,
        StaticScheduler,
        LayerSplitScheduler,
        GpuOnlyScheduler,
        CpuOnlyScheduler,
    )
}


def make_scheduler(name: str, options: Mapping[str, Any]) -> Scheduler:
    """Return the scheduler `name` with `options`."""
    if name not in SCHEDULERS:
        raise ConfigError(unknown_name("scheduler", name, SCHEDULERS))
    return SCHEDULERS[name](**options)
