"""A recorded run replayed as it was: the configuration that its trace carries makes the same decisions again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hybrimoe_kt.core.profile import Profile
from hybrimoe_kt.core.types import RECORDED_SPEC, LayerSpec
from hybrimoe_kt.errors import ConfigError
from hybrimoe_kt.profiles import load_profile

from .scenario import HOST, OFF, Method, Scenario, find_slots
from .trace import Trace
from .trace_file import read_trace

RECORDED = "recorded"
"""The method's name: scheduler, policy, prefetching, cache and hardware profile as in the recorded run."""


def as_recorded(
    path: str | Path, *, hardware: str | None = None, cache: str | float | int | None = None, tokens: int | None = None
) -> tuple[Method, Scenario]:
    """Return what replays the run that wrote `path`; `hardware` and `cache` replace its own where they are given."""
    trace = read_trace(path)
    run = trace.run
    if not run:
        raise ConfigError(f"{path}: does not say how it was recorded; name another --method than {RECORDED!r}")
    if tokens is not None:
        prompts = sum(step.phase == "prefill" for step in trace.steps)
        trace = trace.head(max(1, min(len(trace.steps), prompts + tokens)))
    try:
        method, layers = _method(run), _layers(trace, run)
        profile = _profile(run["profile"]) if hardware is None else load_profile(hardware)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{path}: what it says of its run is incomplete ({error}); name another --method than {RECORDED!r}"
        ) from None
    if cache is not None:
        return method, Scenario(trace, profile, find_slots(cache, trace))
    num_slots = max(spec.num_slots for spec in layers)
    if not num_slots:
        raise ConfigError(
            f"{path}: was recorded with every expert on the CPU; give --cache a size, or another --method"
        )
    return method, Scenario(trace, profile, num_slots, layers=layers)


def _method(run: Mapping[str, Any]) -> Method:
    size = int(run["prefetch_size"])
    return Method(
        scheduler=run["scheduler"],
        policy=run["policy"],
        prefetch=run["predictor"] if size else OFF,
        prefetch_size=size,
        prefetch_depth=run["prefetch_depth"],
        scheduler_options=run["scheduler_options"],
        policy_options=run["policy_options"],
        predictor_options=run["predictor_options"],
        planner=run.get("planner", HOST),
    )


def _layers(trace: Trace, run: Mapping[str, Any]) -> tuple[LayerSpec, ...]:
    rows = zip(*(run[key] for key in RECORDED_SPEC), strict=True)
    names = RECORDED_SPEC.values()
    return tuple(
        replace(spec, **dict(zip(names, row, strict=True))) for spec, row in zip(trace.specs(), rows, strict=True)
    )


def _profile(numbers: Mapping[str, Any]) -> Profile:
    return Profile(**numbers)
