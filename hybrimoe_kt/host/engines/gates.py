"""Asks an engine's own routers what the layers ahead will want, see `device.readback.Predict`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["EngineGate", "GatesAhead", "LocalExperts", "norm_before"]

logger = logging.getLogger(__name__)

Route = Callable[[torch.Tensor], "tuple[torch.Tensor, torch.Tensor]"]


class LocalExperts:
    """What is this rank's of a layer; made once, as it takes a wait for the device that steps must not take."""

    def __init__(self, local_of: torch.Tensor | None) -> None:
        """Expert -> this rank's number of it, -1 for other ranks'; None where all are this rank's."""
        self._local_of = self._columns = None
        if local_of is not None:
            mine = (local_of >= 0).nonzero().flatten()
            self._local_of, self._columns = local_of.long(), mine[local_of[mine].argsort()]

    def ids(self, ids: torch.Tensor) -> torch.Tensor:
        """An engine's expert numbers as this rank's, int64, -1 for what other ranks compute."""
        ids = ids.long()
        return ids if self._local_of is None else torch.where(ids < 0, -1, self._local_of[ids.clamp(min=0)])

    def columns(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits of this rank's experts, in its order."""
        return logits if self._columns is None else logits[:, self._columns]


@dataclass(frozen=True, slots=True)
class EngineGate:
    """A MoE layer's router: `route(hidden)` gives logits `[tokens, experts]` and ids `[tokens, top_k]` of all ranks."""

    layer: int
    route: Route
    norm: torch.Tensor | None
    """Factor of the norm in front of it, `[hidden]`."""
    local_of: torch.Tensor | None
    """Expert -> this rank's number of it, -1 for other ranks'; None where all are this rank's."""


class GatesAhead:
    """The routers of some layers, for the hidden states that enter the layer before them."""

    def __init__(self, own: EngineGate, ahead: Sequence[EngineGate], num_experts: int) -> None:
        """`num_experts` are this rank's, of each of these layers."""
        self.layers: Sequence[int] = [gate.layer for gate in ahead]
        self.num_experts = num_experts
        self._ahead = [(gate, LocalExperts(gate.local_of), _ratio(own.norm, gate.norm)) for gate in ahead]
        self._can_be_asked = True

    @torch.no_grad()
    def __call__(self, hidden: torch.Tensor, ids: torch.Tensor, scores: torch.Tensor) -> None:
        """As of `Predict`; a router that cannot be asked out of turn names no expert, and is not asked again."""
        if self._can_be_asked:
            try:
                self._ask(hidden, ids, scores)
                return
            except Exception as error:  # whatever an engine's routers raise: a guess is worth no step
                self._can_be_asked = False
                logger.info("routers of layers %s cannot be asked ahead: %r", self.layers, error)
        ids.fill_(-1)
        scores.zero_()

    def _ask(self, hidden: torch.Tensor, ids: torch.Tensor, scores: torch.Tensor) -> None:
        for place, (gate, local, ratio) in enumerate(self._ahead):
            logits, chosen = gate.route(hidden if ratio is None else hidden * ratio)
            ids[place].copy_(local.ids(chosen))
            scores[place].copy_(torch.softmax(local.columns(logits).float(), dim=-1).mean(dim=0))


def norm_before(decoder: Any, name: str) -> torch.Tensor | None:
    """The factor of the norm called `name` in front of a decoder layer's router; read when it is loaded."""
    return getattr(getattr(decoder, name, None), "weight", None)


def _ratio(own: torch.Tensor | None, later: torch.Tensor | None) -> torch.Tensor | None:
    """What turns states normalised for one layer into those for another: both divide by the same root mean square."""
    return None if own is None or later is None or own.shape != later.shape else later / own
