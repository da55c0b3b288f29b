"""A model's routed experts on one rank of an engine: gathered while it loads, then run step by step.

Engines batch requests, pad batches, try steps out that mean nothing, and split experts over ranks. Here is what has to
be thought of for that, whoever the engine is:

- ids are of all ranks' experts; pairs that are another rank's become -1, and a step may have nothing for this one;
- rows behind the real tokens are padding, which must neither load experts nor be looked at;
- steps that try something out (memory, graphs) compute nothing and teach nothing;
- a step of many tokens may be one of many requests' next tokens, which one token a step would not tell;
- a step that fails costs the requests that are in it, not the engine.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch

from hybrimoe_kt.config import ExpertOptions
from hybrimoe_kt.core.types import Phase
from hybrimoe_kt.device.backend import Routed
from hybrimoe_kt.device.experts import LayerExperts
from hybrimoe_kt.errors import DeadlineError, first_line
from hybrimoe_kt.runtime import Job, ModelExperts, Runtime, assemble

from .gates import EngineGate, GatesAhead, LocalExperts
from .threads import on_cores

__all__ = ["EngineExperts", "EngineStep", "Pending", "experts_of_rank"]

logger = logging.getLogger(__name__)


class EngineStep(NamedTuple):
    """What an engine knows of the step under way beside its tensors."""

    num_tokens: int | None = None
    """Rows that are tokens; the rest is padding. None: all are."""
    phase: Phase | None = None
    is_trial: bool = False
    """Whether it means nothing: a profiling run, or one that warms up."""


class Pending(NamedTuple):
    """A layer of a step that has begun: `job` is None where there is nothing to wait for."""

    layer: int
    hidden: torch.Tensor
    job: Job | None
    num_tokens: int


class EngineExperts:
    """One a model and rank. Layers are `add`ed while weights are read, `start` makes what runs them."""

    def __init__(
        self, options: ExpertOptions, cores: frozenset[int] = frozenset(), *, tells_by_answer: bool = True
    ) -> None:
        """`cores` are those that this rank computes on, see `cores_of_rank`; empty: whichever the process may use.

        `tells_by_answer`: a step that failed is told by the last layer's answer, see `finish`, else `take_failure` is
        asked when the model has answered.
        """
        self.options, self._cores, self._tells_by_answer = options, cores, tells_by_answer
        self._experts = ModelExperts(options)
        self._gates: dict[int, EngineGate] = {}
        self._local: dict[int, LocalExperts] = {}
        self._runtime: Runtime | None = None
        self._logits: torch.Tensor | None = None
        self._first = self._last = -1
        self._failure: Exception | None = None

    @property
    def runtime(self) -> Runtime:
        """What computes, once started."""
        assert self._runtime is not None, "an engine starts its experts before its first step"
        return self._runtime

    @property
    def layers(self) -> list[int]:
        """The MoE layers on this rank, in order."""
        return sorted(self._experts.store.layers)

    def add(
        self,
        experts: LayerExperts,
        gate: EngineGate | None = None,
        local_of: torch.Tensor | None = None,
        *,
        is_share: bool = False,
    ) -> None:
        """Take this rank's experts of a layer, and its router where the engine shows it.

        Where other ranks have further ones `local_of`, as of `EngineGate`, says which are whose; or the engine itself
        has turned ids into this rank's, -1 for others': then `is_share`.
        """
        self._experts.add(experts)
        self._experts.is_share |= is_share or local_of is not None
        self._local[experts.layer] = LocalExperts(local_of)
        if gate is not None:
            self._gates[experts.layer] = gate

    def start(self) -> Runtime:
        """Make slots and backends, on this rank's cores, and attach the routers; errors as of `runtime.assemble`."""
        with on_cores(self._cores):
            runtime = self._runtime = assemble(self._experts)
        self._first, self._last = self.layers[0], self.layers[-1]
        with_gates = sorted(self._gates)
        for place, layer in enumerate(with_gates):
            later = with_gates[place + 1 : place + 1 + runtime.options.prefetch_depth]
            sizes = {runtime.store.layers[number].num_experts for number in later}
            widths = {runtime.store.layers[number].hidden for number in (layer, *later)}
            if later and len(sizes) == 1 and len(widths) == 1:
                ahead = [self._gates[number] for number in later]
                runtime.look_ahead(layer, GatesAhead(self._gates[layer], ahead, sizes.pop()))
        return runtime

    @property
    def wants_logits(self) -> bool:
        """Whether anything learns from routers' logits."""
        return self._runtime is not None and self._runtime.wants_scores

    def note_logits(self, logits: torch.Tensor) -> None:
        """Take the router's logits `[rows, experts of all ranks]` of the layer that comes next."""
        self._logits = logits

    def begin(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, step: EngineStep
    ) -> Pending:
        """Start a layer: `hidden [rows, hidden]`, ids of all ranks and weights `[rows, top_k]`.

        What the engine computes until `finish` runs beside the CPU's share. Never raises for a step that fails.
        """
        logits, self._logits = self._logits, None
        num_tokens = hidden.shape[0] if step.num_tokens is None else min(step.num_tokens, hidden.shape[0])
        if layer == self._first:
            self._failure = None
        if step.is_trial or self._failure is not None or not num_tokens:
            return Pending(layer, hidden, None, 0)
        try:
            local = self._local[layer]
            mine = local.ids(ids[:num_tokens])
            scored = None if logits is None else local.columns(logits[:num_tokens])
            routed = Routed(hidden[:num_tokens], mine, weights[:num_tokens].float(), scored, step.phase)
            return Pending(layer, hidden, self.runtime.begin(layer, routed), num_tokens)
        except Exception as error:
            self._fail(layer, error)
            return Pending(layer, hidden, None, 0)

    def finish(self, pending: Pending) -> torch.Tensor:
        """Wait for what was begun; `[rows, hidden]` as the hidden states, zero in padding.

        From the layer on that failed the step's answers are zeros, so that nothing that is kept of it is poisoned. The
        last layer's may be NaN: that reaches the logits over whatever lies between, other ranks' included, and tells
        whoever sees them that these requests are lost.
        """
        layer, hidden, job, num_tokens = pending
        answer: torch.Tensor | None = None
        if job is not None:
            try:
                answer = self.runtime.finish(job)
            except Exception as error:
                self._fail(layer, error)
        if self._failure is not None and layer == self._last and self._tells_by_answer:
            return torch.full_like(hidden, float("nan"))
        if answer is not None and num_tokens == hidden.shape[0]:
            return answer
        whole = torch.zeros_like(hidden)
        if answer is not None:
            whole[:num_tokens] = answer
        return whole

    def take_failure(self) -> Exception | None:
        """What the last step has failed with, told once."""
        failure, self._failure = self._failure, None
        return failure

    def run(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, step: EngineStep
    ) -> torch.Tensor:
        """`begin` and `finish`."""
        return self.finish(self.begin(layer, hidden, ids, weights, step))

    def _fail(self, layer: int, error: Exception) -> None:
        """Give the step up; what no later step could survive is the engine's end."""
        if isinstance(error, DeadlineError):
            raise error
        self._failure = error
        logger.error("layer %d: %s; the requests of this step are lost", layer, first_line(error), exc_info=error)


def experts_of_rank(local_of: Sequence[int]) -> list[int]:
    """Expert -> this rank's number, turned round: this rank's experts in its order."""
    mine = [(number, expert) for expert, number in enumerate(local_of) if number >= 0]
    return [expert for _, expert in sorted(mine)]
