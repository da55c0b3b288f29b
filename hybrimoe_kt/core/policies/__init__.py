"""What chooses which expert loses its slot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hybrimoe_kt.core.registry import find
from hybrimoe_kt.core.types import LayerSpec

from .adaptive import AdaptivePolicy
from .base import Policy
from .baselines import BeladyPolicy, LeastStalePolicy, LfruPolicy, LfuPolicy, LruPolicy, StaticFrequencyPolicy
from .mrs import MrsPolicy

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
    """Return a fresh policy (built in, or at a dotted path) per layer; those of one call may share what they learn."""
    return find("policy", name, POLICIES, Policy).for_layers(specs, options)
