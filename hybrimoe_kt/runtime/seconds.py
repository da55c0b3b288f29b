"""Where a runtime's time goes."""

from __future__ import annotations

from dataclasses import dataclass, fields

__all__ = ["Seconds"]


@dataclass(slots=True)
class Seconds:
    """Where this runtime's wall-clock time went, seconds since the last reset."""

    read: float = 0.0
    plan: float = 0.0
    prefetch: float = 0.0
    submit_and_gpu: float = 0.0
    wait: float = 0.0
    replay: float = 0.0
    """Enqueuing captured pieces, which are the model's own work."""
    steps: int = 0

    def reset(self) -> None:
        for name in fields(self):
            setattr(self, name.name, 0)

    @property
    def total(self) -> float:
        """All time inside the experts operators."""
        return self.read + self.plan + self.prefetch + self.submit_and_gpu + self.wait
