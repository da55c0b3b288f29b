"""What chooses which expert loses its slot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hybrimoe_kt.core.types import LayerSpec
from hybrimoe_kt.errors import ConfigError, unknown_name

from .adaptive import AdaptivePolicy
from .base import Policy
from .belady import BeladyPolicy
from .lfu import LeastStalePolicy, LfruPolicy, LfuPolicy
from .lru import LruPolicy
from .mrs import MrsPolicy
from .static_frequency import StaticFrequencyPolicy

__all__ = ["POLICIES", "Policy", "make_policies"]

POLICIES: Mapping[str, type[Policy]] = {
    cls.name: cls
    for cls in (
        AdaptivePolicy,
        MrsPolicy,
        LruPolicy,
        LfuPolicy,
        LfruPolicy,
        LeastStalePolicy,
        StaticFrequencyPolicy,
        BeladyPolicy,
    )
}


def make_policies(name: str, specs: Sequence[LayerSpec], options: Mapping[str, Any]) -> list[Policy]:
    """Return a fresh policy per layer; those of one call may share what they learn."""
    if name not in POLICIES:
        raise ConfigError(unknown_name("policy", name, POLICIES))
    return POLICIES[name].for_layers(specs, options)
