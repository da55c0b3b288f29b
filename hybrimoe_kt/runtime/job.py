"""What is known of a layer step that has begun."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from hybrimoe_kt.core.types import Plan, Routing
from hybrimoe_kt.device.backend import Routed
from hybrimoe_kt.device.readback import Step
from hybrimoe_kt.device.sent_routing import SentRouting

__all__ = ["Job"]


@dataclass(slots=True)
class Job:
    """One layer step between `Runtime.begin` and `Runtime.finish`."""

    layer: int
    home: torch.device | None = None
    """Where the answer goes, if that is not where it is computed."""
    before: list[torch.Tensor] = field(default_factory=list)
    """Answers of the chunks before the last."""
    answer: torch.Tensor | None = None
    """Of the last chunk, where nothing of it is left to wait for."""
    on_cpu: Routed | None = None
    """The last chunk, where the CPU computes all of it and nobody asks for a plan."""
    predicted_s: float = 0.0
    """Of such a chunk."""
    plan: Plan | None = None
    step: Step | None = None
    routing: Routing | None = None
    logits: torch.Tensor | None = None
    read_s: float = 0.0
    sent: SentRouting | None = None
    """What a captured step has sent of the last chunk, which is then the only one."""
    can_wait: bool = False
    """Whether learning from it and looking ahead come after it has been finished, see `Runtime.settle`."""
