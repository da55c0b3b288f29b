"""The nouns every part of the package speaks: plain frozen data keyed by expert ids, never by positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple


class ExpertId(NamedTuple):
    """One routed FFN: decoder layer (as the model numbers it, dense layers included) and index within it."""

    layer: int
    index: int  # type: ignore[assignment]  # the field hides tuple.index on purpose


_NOWHERE: Mapping[int, int] = {}

TransferKind = Literal["on_demand", "prefetch"]
Phase = Literal["prefill", "decode"]


def is_decode(num_tokens: int, phase: Phase | None) -> bool:
    """Whether a step continues texts rather than reading a prompt: the one place that knows.

    A host that does not say decodes one token at a time.
    """
    return num_tokens == 1 if phase is None else phase == "decode"


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What the core must know about one MoE layer; fixed for the life of a model."""

    layer: int
    num_experts: int
    top_k: int
    expert_bytes: int
    num_slots: int = 0
    accelerator: int = 0
    """Which accelerator (and link) serves this layer."""
    gpu_supported: bool = True
    """False where no GPU kernel reads this layer's expert type: its experts then stay on the CPU."""
    num_buffer_slots: int = 0
    """Slots lent to this layer for one prompt step: layers take turns in two buffers of so many.

    They are numbered from `num_slots` on, filled while the layer before computes, and empty afterwards.
    """


RECORDED_SPEC = {
    "num_slots": "num_slots",
    "accelerator": "accelerator",
    "gpu_supported": "gpu_supported",
    "num_stream_slots": "num_buffer_slots",
}
"""What a run decides of each layer, as recordings call it -> field of `LayerSpec`; the rest of it is the model's."""


class Routing(NamedTuple):
    """The router's choice for one step of one layer.

    `loads` maps expert index -> tokens routed to it (only experts with at least one), in the order first
    met; `scores` are the router's probabilities averaged over the step's tokens, `[num_experts]`, absent
    where the host cannot see them; `weights` maps expert index -> summed routing weight. Treat all as
    read-only. `phase` is what the step is part of, where the host says so.
    """

    layer: int
    loads: Mapping[int, int]
    num_tokens: int = 1
    scores: Sequence[float] | None = None
    weights: Mapping[int, float] | None = None
    phase: Phase | None = None

    @property
    def is_decode(self) -> bool:
        """See `is_decode`."""
        return is_decode(self.num_tokens, self.phase)


class Transfer(NamedTuple):
    """Host-to-GPU copy of one expert into `slot` (an index into its layer's slots).

    `evicted` is the expert whose weights stood there before. The copy may start once everything that
    reads the old weights has finished: the device layer orders that, the core only decides it.
    """

    expert: ExpertId
    slot: int
    num_bytes: int
    kind: TransferKind = "on_demand"
    evicted: ExpertId | None = None


class Plan(NamedTuple):
    """Immutable assignment of one layer step to CPU, GPU and link.

    `cpu` and `gpu` partition the routed experts; `gpu` is in launch order and names resident, pending and
    arriving experts; `transfers` are this layer's on-demand copies in link order. `slots` maps every expert in
    `gpu` -> its slot. `makespan_s` is the predicted end of the routed experts' work, `cpu_s` that of the CPU's share,
    seconds after the start.

    `dropped` and `closed` are to be heeded before anything of it starts, see `Orders`.
    """

    layer: int
    cpu: tuple[int, ...]
    gpu: tuple[int, ...] = ()
    transfers: tuple[Transfer, ...] = ()
    slots: Mapping[int, int] = _NOWHERE
    makespan_s: float = 0.0
    cpu_s: float = 0.0
    num_hits: int = 0
    dropped: tuple[Transfer, ...] = ()
    closed: tuple[int, ...] = ()


class Orders(NamedTuple):
    """What a device has to do beside plans, in the order `dropped`, `closed`, `transfers`.

    `transfers` are prefetches to start, in link order; one may be for the layer at hand, an admission for later tokens.
    `dropped` are prefetches handed out earlier that need not be made any more, oldest first: skipping them is a
    permission, not a duty, as whatever comes into their slots comes later on the same link. Nothing may be sent any
    more into the slots lent to the layers in `closed`.
    """

    transfers: tuple[Transfer, ...] = ()
    dropped: tuple[Transfer, ...] = ()
    closed: tuple[int, ...] = ()
