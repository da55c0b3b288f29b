"""Guesses of the next layers' routing: from the host's look-ahead gates, or learned online."""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from heapq import nlargest
from typing import Any, ClassVar

from hybrimoe_kt.core.policies.base import check_options, check_range
from hybrimoe_kt.core.registry import find
from hybrimoe_kt.core.types import LayerSpec, Routing


class Predictor(ABC):
    """Turns what is known after one layer's routing into predicted routings of the layers after it."""

    name: ClassVar[str] = ""
    options: ClassVar[Mapping[str, Any]] = {}
    """Option name -> default."""
    learns: ClassVar[bool] = True
    """Whether `observe` does anything."""
    passes_on: ClassVar[bool] = False
    """Whether `predict` returns what it is given, so that nobody need ask."""
    reads_scores: ClassVar[bool] = True
    """Whether `observe` or `predict` look at the scores of a layer's own routing."""

    def __init__(self, specs: Sequence[LayerSpec], **options: Any) -> None:
        self.option = check_options(f"predictor {self.name or type(self).__name__}", options, self.options)
        self.specs = {spec.layer: spec for spec in specs}
        self.order = [spec.layer for spec in specs]
        self._position = {layer: position for position, layer in enumerate(self.order)}

    def observe(self, routing: Routing) -> None:  # noqa: B027  nothing to learn is the default
        """Learn from a layer's actual routing; called once per plan, in order."""

    @abstractmethod
    def predict(self, routing: Routing, given: Sequence[Routing], depth: int) -> Sequence[Routing]:
        """Return up to `depth` predicted routings; `given` is what the host's look-ahead gates say, maybe empty."""

    def following(self, layer: int, depth: int) -> list[LayerSpec]:
        """Return the next `depth` MoE layers, past the last one from the first on."""
        position = self._position[layer]
        count = min(depth, len(self.order))
        return [self.specs[self.order[(position + i) % len(self.order)]] for i in range(1, count + 1)]


class StaleGatePredictor(Predictor):
    """The next layers' gates applied to this layer's hidden state, as the host computed them (the paper)."""

    name = "stale_gate"
    learns = reads_scores = False
    passes_on = True

    def predict(self, routing: Routing, given: Sequence[Routing], depth: int) -> Sequence[Routing]:
        """Return the host's look-ahead unchanged."""
        return given[:depth]


class PerfectPredictor(StaleGatePredictor):
    """The true routing of the next layers, handed in by a replay that knows it: a bound."""

    name = "perfect"


class CorrectedGatePredictor(Predictor):
    """Look-ahead gates plus an online residual: the average of what they were off by, per layer and expert."""

    name = "corrected_gate"
    options = {"rate": 0.1}  # noqa: RUF012

    def __init__(self, specs: Sequence[LayerSpec], **options: Any) -> None:
        super().__init__(specs, **options)
        check_range("predictor corrected_gate", "rate", self.option["rate"], 0.0, 1.0)
        self._residual = {spec.layer: [0.0] * spec.num_experts for spec in specs}
        self._guess: dict[int, Routing] = {}

    def observe(self, routing: Routing) -> None:
        """Move the residual of the layer towards actual - guessed."""
        guess = self._guess.pop(routing.layer, None)
        if guess is None or guess.num_tokens != routing.num_tokens:
            return
        num_experts, rate = self.specs[routing.layer].num_experts, self.option["rate"]
        both = guess.scores is not None and routing.scores is not None
        actual = _vector(routing, num_experts, both)
        guessed = _vector(guess, num_experts, both)
        self._residual[routing.layer] = [
            r + rate * (a - g - r) for r, a, g in zip(self._residual[routing.layer], actual, guessed, strict=True)
        ]

    def predict(self, routing: Routing, given: Sequence[Routing], depth: int) -> Sequence[Routing]:
        """Return the host's look-ahead with its top-k chosen anew from corrected scores (one token only)."""
        result = []
        for ahead, guess in enumerate(given[:depth]):
            if ahead == 0:
                kept = None if guess.scores is None else list(guess.scores)  # whose memory is the host's to reuse
                self._guess[guess.layer] = guess._replace(scores=kept)
            spec = self.specs[guess.layer]
            raw = _vector(guess, spec.num_experts, guess.scores is not None)
            corrected = [s + r for s, r in zip(raw, self._residual[guess.layer], strict=True)]
            result.append(_top(guess.layer, corrected, len(guess.loads)) if guess.num_tokens == 1 else guess)
        return result


class HistoryPredictor(Predictor):
    """The experts used most lately, whatever this token does: what the paper's released code prefetches."""

    name = "history"
    reads_scores = False
    options = {"rate": 0.1}  # noqa: RUF012

    def __init__(self, specs: Sequence[LayerSpec], **options: Any) -> None:
        super().__init__(specs, **options)
        check_range("predictor history", "rate", self.option["rate"], 1e-6, 1.0)
        self._use = {spec.layer: [0.0] * spec.num_experts for spec in specs}
        self._gain = dict.fromkeys(self._use, 1.0)

    def observe(self, routing: Routing) -> None:
        """Add the step to the layer's average."""
        layer = routing.layer
        gain = self._gain[layer] = self._gain[layer] / max(1.0 - self.option["rate"], 1e-6)
        use = self._use[layer]
        if gain > 1e100:
            self._use[layer] = use = [value / gain for value in use]
            gain = self._gain[layer] = 1.0
        for expert, load in routing.loads.items():
            use[expert] += gain * load / routing.num_tokens

    def predict(self, routing: Routing, given: Sequence[Routing], depth: int) -> Sequence[Routing]:
        """Return each following layer's most used top-k."""
        return [_top(s.layer, self._use[s.layer], s.top_k) for s in self.following(routing.layer, depth)]


class TransitionPredictor(Predictor):
    """Counts which experts of the next layer followed which of this one, learned online from decode steps.

    A row of counts is one big integer with a 16-bit field per expert, so adding rows costs as much as adding
    numbers. Only the next layer is predicted: depth counts for nothing here.
    """

    name = "transition"
    reads_scores = False
    options = {"max_count": 1023}  # noqa: RUF012

    def __init__(self, specs: Sequence[LayerSpec], **options: Any) -> None:
        super().__init__(specs, **options)
        check_range("predictor transition", "max_count", self.option["max_count"], 1, 2047)
        self._rows = {spec.layer: [0] * spec.num_experts for spec in specs}
        self._seen = {spec.layer: [0] * spec.num_experts for spec in specs}
        self._last: Routing | None = None

    def observe(self, routing: Routing) -> None:
        """Count this layer's experts for every expert of the layer before."""
        last, self._last = self._last, routing if routing.is_decode else None
        if last is None or self._last is None or self.following(last.layer, 1)[0].layer != routing.layer:
            return
        rows, seen = self._rows[last.layer], self._seen[last.layer]
        mark = sum([1 << (16 * expert) for expert in routing.loads])
        for expert in last.loads:
            rows[expert] += mark
            seen[expert] += 1
            if seen[expert] > self.option["max_count"]:
                low = int.from_bytes(b"\xff\x7f" * self.specs[routing.layer].num_experts, "little")
                rows[expert] = (rows[expert] >> 1) & low
                seen[expert] >>= 1

    def predict(self, routing: Routing, given: Sequence[Routing], depth: int) -> Sequence[Routing]:
        """Return the next layer's likeliest by summed counts, as many as are used here; nothing before any are known.

        Nor for a prompt.
        """
        rows = self._rows[routing.layer]
        total = sum([rows[expert] for expert in routing.loads])
        if not routing.is_decode or not total:
            return ()
        spec = self.following(routing.layer, 1)[0]
        votes = struct.unpack(f"<{spec.num_experts}H", total.to_bytes(2 * spec.num_experts, "little"))
        return (_top(spec.layer, votes, max(spec.top_k, len(routing.loads))),)


def _vector(routing: Routing, num_experts: int, by_score: bool) -> Sequence[float]:
    if by_score and routing.scores is not None:
        return routing.scores
    result = [0.0] * num_experts
    for expert in routing.loads:
        result[expert] = 1.0
    return result


def _top(layer: int, scores: Sequence[float], top_k: int) -> Routing:
    """Return the routing of one token to the `top_k` highest positive scores, the highest first."""
    best = nlargest(top_k, [(score, -expert) for expert, score in enumerate(scores) if score > 0])
    return Routing(layer, {-minus_expert: 1 for _, minus_expert in best}, 1, scores)


PREDICTORS: Mapping[str, type[Predictor]] = {
    cls.name: cls
    for cls in (StaleGatePredictor, CorrectedGatePredictor, HistoryPredictor, TransitionPredictor, PerfectPredictor)
}


def make_predictor(name: str, specs: Sequence[LayerSpec], options: Mapping[str, Any]) -> Predictor:
    """Return the predictor `name` (or at a dotted path) for a model's layers."""
    return find("predictor", name, PREDICTORS, Predictor)(specs, **options)
