"""Minus Recent Score, the paper's policy: an exponential average of the router's top probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hybrimoe_kt.core.types import LayerSpec, Routing

from .base import Policy, check_range

SCORE_BITS = 30
"""Where a device keeps averages, they are whole multiples of 2^-30."""


class MrsPolicy(Policy):
    """S <- alpha * TopP(s) + (1 - alpha) * S, victim = lowest S (paper, section 4.4).

    The paper gives no alpha and the release uses 0.5; on the shared Qwen3-30B and Gemma-4-26B decode traces at
    12.5 / 25 / 50 % slots 0.03 gave the best mean hit rate of 0.5, 0.3, 0.1, 0.07, 0.05, 0.03 and 0.02.
    `top_p` is the number of probabilities kept, as a multiple of the layer's top-k. Without scores the routed
    experts' weights stand in. The averages are stored divided by (1 - alpha)^step, so a step touches only
    the experts it adds to.
    """

    name = "mrs"
    options = {"alpha": 0.03, "top_p": 2.0}  # noqa: RUF012

    def __init__(self, spec: LayerSpec, **options: Any) -> None:
        super().__init__(spec, **options)
        check_range("policy mrs", "alpha", self.option["alpha"], 1e-6, 1.0)
        check_range("policy mrs", "top_p", self.option["top_p"], 1.0, float("inf"))
        self._keep = max(1, min(spec.num_experts, round(self.option["top_p"] * spec.top_k)))
        self._decay = max(1.0 - self.option["alpha"], 1e-6)
        self._gain = 1.0
        self._scores = [0.0] * spec.num_experts

    def touch(self, routing: Routing) -> None:
        """Add the step's top probabilities."""
        self._gain = gain = self._gain / self._decay
        if gain > 1e100:
            self._rescale()
            gain = 1.0
        stored, scores = self._scores, routing.scores
        if scores is not None:
            cut = max(sorted(scores, reverse=True)[self._keep - 1], 1e-300)
            for expert, score in enumerate(scores):
                if score >= cut:
                    stored[expert] += gain * score
        elif routing.weights is not None:
            for expert, weight in routing.weights.items():
                stored[expert] += gain * weight / routing.num_tokens
        else:
            for expert, load in routing.loads.items():
                stored[expert] += gain * load / routing.num_tokens

    def value(self, expert: int) -> float:
        """Return the average score, up to a factor common to all experts."""
        return self._scores[expert]

    def rank(self, candidates: Sequence[int]) -> list[int]:
        """Return `candidates`, the lowest average score first."""
        return sorted(candidates, key=self._scores.__getitem__)

    def standing(self) -> list[int]:
        """Averages in units of 2^-30."""
        one = 1 << SCORE_BITS
        factor = self.option["alpha"] / self._gain * one
        return [min(one, round(score * factor)) for score in self._scores]

    def resume(self, standing: Sequence[int], clock: int) -> None:
        """Take the averages as they are."""
        factor = self._gain / (self.option["alpha"] * (1 << SCORE_BITS))
        self._scores = [score * factor for score in standing]

    def _rescale(self) -> None:
        factor, self._gain = 1.0 / self._gain, 1.0
        self._scores = [score * factor for score in self._scores]
