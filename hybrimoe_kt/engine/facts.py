"""What an engine tells of its model, and what it has counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hybrimoe_kt.runtime.health import Health

__all__ = ["Counters", "ModelInfo"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What a model is; it does not change while it runs."""

    architecture: str
    """Transformers' name of it, such as qwen3_moe."""
    hidden_size: int
    num_layers: int
    """All layers, also those without experts."""
    expert_bytes: int
    """Of all routed experts together, as they lie in the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """What was counted since the model was loaded; experts are `[num_moe_layers][num_experts]`."""

    accelerators: tuple[str, ...]
    """Those that serve layers now; none on a CPU-only machine, and none that was given up."""
    health: Health
    statistics: Mapping[str, float]
    """Every counter by name; empty before the runtime has started."""
    hits: Sequence[Sequence[int]]
    """How often each expert was routed to and found ready on an accelerator."""
    misses: Sequence[Sequence[int]]
    last_hits: Sequence[Sequence[int]]
    """Expert ids by layer that the last token decoded on its own found ready."""
    last_misses: Sequence[Sequence[int]]
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Measured on the host's clock, where experts' time went, by name; `steps` is all time in steps of the model."""
    busy: Mapping[str, float] = field(default_factory=dict)
    """Measured share of the experts' steps that `cpu`, `gpu`, `link` and `host` were busy; see `device.busy`."""
    kept: Mapping[str, int] = field(default_factory=dict)
    """Of conversations that are kept: their number, and the bytes they take."""
