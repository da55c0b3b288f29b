"""The schedulers by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrimoe_kt.errors import ConfigError, unknown_name

from .balanced import BalancedScheduler
from .greedy import PaperScheduler
from .scheduler import (
    CpuOnlyScheduler,
    FiddlerScheduler,
    GpuOnlyScheduler,
    LayerSplitScheduler,
    Scheduler,
    StaticScheduler,
)

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
