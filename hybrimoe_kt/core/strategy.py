"""How a model's experts are scheduled, kept and prefetched: everything of a `Coordinator` that a user may choose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from hybrimoe_kt.errors import ConfigError

from .policies import POLICIES, Policy, make_policies
from .prefetch.predictors import Predictor, make_predictor
from .registry import find
from .schedule import Scheduler, make_scheduler
from .types import LayerSpec

__all__ = ["MAX_PREFETCH_DEPTH", "Strategy"]

MAX_PREFETCH_DEPTH = 3
_SOME_LAYERS = (LayerSpec(0, 8, 2, 1, 4), LayerSpec(1, 8, 2, 1, 4))
"""What options are tried on: whether they are valid depends on no model."""


@dataclass(frozen=True, slots=True)
class Strategy:
    """Validated when made, options of options included; ConfigError names what is wrong and what is valid.

    `scheduler`, `policy` and `predictor` are names or dotted paths. At most `prefetch_size` transfers start per layer
    (0: none), for the next `prefetch_depth` layers (1 to 3). With `admission` what the link's idle time has left
    brings experts that the CPU just computed, for later tokens; None: only under the `balanced` scheduler, as no
    published method does it.
    """

    scheduler: str = "balanced"
    scheduler_options: Mapping[str, Any] = field(default_factory=dict)
    policy: str = "adaptive"
    policy_options: Mapping[str, Any] = field(default_factory=dict)
    predictor: str = "stale_gate"
    predictor_options: Mapping[str, Any] = field(default_factory=dict)
    prefetch_size: int = 1
    prefetch_depth: int = 1
    admission: bool | None = None

    def __post_init__(self) -> None:
        for name in ("scheduler", "policy", "predictor"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"{name} is {getattr(self, name)!r}, valid: a name")
            _check_options(f"{name}_options", getattr(self, f"{name}_options"))
        _check_count("prefetch_size", self.prefetch_size, 0, 1024)
        _check_count("prefetch_depth", self.prefetch_depth, 1, MAX_PREFETCH_DEPTH)
        self.make_scheduler()
        self.make_predictor(_SOME_LAYERS)
        if "future" not in find("policy", self.policy, POLICIES, Policy).options:  # which is no option of a user's
            self.make_policies(_SOME_LAYERS)

    @property
    def admits(self) -> bool:
        """Whether idle link time brings experts for later tokens."""
        return self.scheduler == "balanced" if self.admission is None else self.admission

    def make_scheduler(self) -> Scheduler:
        """A scheduler of this strategy."""
        return make_scheduler(self.scheduler, self.scheduler_options)

    def make_policies(self, layers: Sequence[LayerSpec]) -> list[Policy]:
        """A fresh policy per layer; they may share what they learn."""
        return make_policies(self.policy, layers, self.policy_options)

    def make_predictor(self, layers: Sequence[LayerSpec]) -> Predictor:
        """A fresh predictor of a model's layers."""
        return make_predictor(self.predictor, layers, self.predictor_options)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as recordings keep it."""
        values = {option.name: getattr(self, option.name) for option in fields(self)}
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Every field."""
        return tuple(option.name for option in fields(cls))


def _check_options(name: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} must be a mapping of option names to values")
    if not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{name} has an option that is not a name: {list(value)}")


def _check_count(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{name} is {value!r}, valid: a whole number from {low} to {high}")
