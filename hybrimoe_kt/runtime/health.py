"""What went wrong while a model ran, as plain counts: no failure may hide behind a right answer.

An accelerator that fails is answered for by the CPU, so the text stays right and only the speed tells. Statistics,
metrics, `hybrimoe doctor` and every benchmark therefore ask here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["AcceleratorHealth", "Health"]


@dataclass(slots=True)
class AcceleratorHealth:
    """Counts of one accelerator since the model was loaded."""

    failed_steps: int = 0
    """Layer steps it failed at; the CPU computed them."""
    shrunk: int = 0
    """How often its expert cache was made smaller for want of memory."""
    given_up: bool = False
    """Whether it is not asked any more."""
    last_failure: str = ""
    """The last failure's first line."""

    @property
    def is_clean(self) -> bool:
        return not (self.failed_steps or self.shrunk or self.given_up)


@dataclass(slots=True)
class Health:
    """Every accelerator's counts by name, and what the fallback does instead of hybrid plans."""

    accelerators: dict[str, AcceleratorHealth] = field(default_factory=dict)
    fallback: str = "off"
    """Either off, or hybrid (it watches, and hybrid plans pay so far), trying cpu_only, cpu_only (for good); gpu_only
    likewise."""

    @property
    def is_clean(self) -> bool:
        """Whether times measured so far are those of what was asked for."""
        return self.word == ""

    @property
    def word(self) -> str:
        """The worst of it in one word: abandoned, failed, shrunk or fallback; empty when nothing happened."""
        accelerators = self.accelerators.values()
        if any(accelerator.given_up for accelerator in accelerators):
            return "abandoned"
        if any(accelerator.failed_steps for accelerator in accelerators):
            return "failed"
        if any(accelerator.shrunk for accelerator in accelerators):
            return "shrunk"
        return "fallback" if self.fallback in ("cpu_only", "gpu_only") else ""

    def as_dict(self) -> dict[str, Any]:
        """Plain data: `{"accelerators": {name: {...}}, "fallback": ..., "word": ...}`."""
        return asdict(self) | {"word": self.word}
