"""What every cache policy promises: a retention value per expert of one layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from hybrimoe_kt.core.types import LayerSpec, Routing
from hybrimoe_kt.errors import ConfigError, nearest


class Policy(ABC):
    """Ranks one layer's experts by retention value; the lowest loses its slot first.

    One object per layer. It sees every routing of its layer through `touch` and nothing of the future. Ties
    fall to the expert met first in the candidates' order, so equal inputs give equal victims.
    """

    name: ClassVar[str] = ""
    options: ClassVar[Mapping[str, Any]] = {}
    """Option name -> default."""
    reads_scores: ClassVar[bool] = True
    """Whether `touch` looks at a routing's scores; where nothing does, no host need bring them."""

    def __init__(self, spec: LayerSpec, **options: Any) -> None:
        self.spec = spec
        self.option = check_options(f"policy {self.name or type(self).__name__}", options, self.options)
        self.step = 0

    @classmethod
    def for_layers(cls, specs: Sequence[LayerSpec], options: Mapping[str, Any]) -> list[Policy]:
        """Return one policy per layer; override it to let the layers share what they learn."""
        return [cls(spec, **options) for spec in specs]

    @abstractmethod
    def touch(self, routing: Routing) -> None:
        """Learn what one step routed to; called once per step, after the step's plan is made."""

    @abstractmethod
    def value(self, expert: int) -> float:
        """Return the retention value of `expert` now; only its order among this layer's experts matters."""

    def rank(self, candidates: Sequence[int]) -> list[int]:
        """Return `candidates`, the first victim first."""
        return sorted(candidates, key=self.value)

    def first(self, candidates: Sequence[int]) -> int:
        """Return the first of `rank`'s order."""
        return self.rank(candidates)[0]

    @property
    def clock(self) -> int:
        """Routed experts so far, where `standing` are stamps of it."""
        return 0

    def standing(self) -> list[int]:
        """What every expert is worth, as `device_rules` has it. ConfigError for policies that devices do not have."""
        raise ConfigError(f"policy {self.name or type(self).__name__} is not kept on a device; give mrs or lru")

    def resume(self, standing: Sequence[int], clock: int) -> None:
        """Go on from what a device has left behind."""
        raise ConfigError(f"policy {self.name or type(self).__name__} is not kept on a device; give mrs or lru")

    def admits(self, expert: int, victim: int) -> bool:
        """Whether `expert` deserves `victim`'s slot beyond the step that needs it now."""
        return self.value(expert) > self.value(victim)


def check_options(owner: str, given: Mapping[str, Any], valid: Mapping[str, Any]) -> dict[str, Any]:
    """Return `valid` overlaid with `given`; a key that `valid` lacks or a value of another kind is a ConfigError."""
    for key, value in given.items():
        if key not in valid:
            names = ", ".join(sorted(valid)) or "none"
            raise ConfigError(f"{owner}: unknown option {key!r}{nearest(key, valid) or ';'} valid: {names}")
        default = valid[key]
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if isinstance(default, (int, float)) and not isinstance(default, bool) and not is_number:
            raise ConfigError(f"{owner}: option {key} is {value!r}; give a number (default {default!r})")
    return {**valid, **given}


def check_range(owner: str, key: str, value: float, low: float, high: float) -> None:
    """Raise a ConfigError unless low <= value <= high."""
    if not low <= value <= high:
        raise ConfigError(f"{owner}: option {key} is {value!r}; it must be between {low:g} and {high:g}")
