"""A fixed ranking: the experts that start in slots are the ones that stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hybrimoe_kt.core.types import LayerSpec, Routing

from .base import Policy


class StaticFrequencyPolicy(Policy):
    """Value = a frequency known beforehand, never updated; without one, lower indices are worth more.

    `frequencies` maps layer -> a number per expert. A transfer is admitted past its step only where the
    table says so; with a full cache of the most frequent experts that is never.
    """

    name = "static_frequency"
    options = {"frequencies": None}  # noqa: RUF012

    def __init__(self, spec: LayerSpec, **options: Any) -> None:
        super().__init__(spec, **options)
        given: Mapping[int, Sequence[float]] = self.option["frequencies"] or {}
        self._table = list(given.get(spec.layer, [-float(e) for e in range(spec.num_experts)]))

    def touch(self, routing: Routing) -> None:
        """Learn nothing."""

    def value(self, expert: int) -> float:
        """Return the expert's fixed frequency."""
        return self._table[expert]
