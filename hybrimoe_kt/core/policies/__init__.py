"""What chooses which expert loses its slot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrimoe_kt.core.policies.base import Policy
from hybrimoe_kt.core.policies.lru import LruPolicy
from hybrimoe_kt.core.policies.mrs import MrsPolicy
from hybrimoe_kt.core.types import LayerSpec
from hybrimoe_kt.errors import ConfigError, unknown_name

__all__ = ["POLICIES", "Policy", "make_policy"]

POLICIES: Mapping[str, type[Policy]] = {cls.name: cls for cls in (LruPolicy, MrsPolicy)}


def make_policy(name: str, spec: LayerSpec, options: Mapping[str, Any]) -> Policy:
    """Return a fresh policy for one layer."""
    if name not in POLICIES:
        raise ConfigError(unknown_name("policy", name, POLICIES))
    return POLICIES[name](spec, **options)
