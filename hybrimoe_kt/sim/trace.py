"""Recorded routing of a model: arrays for the statistics, `Routing` objects for the core."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from hybrimoe_kt.core.types import LayerSpec, Routing
from hybrimoe_kt.errors import ConfigError

Phase = Literal["prefill", "decode"]
Array = npt.NDArray[Any]
ABSENT = -1


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass: `num_tokens` rows of the trace's token axis, beginning at `first_token`."""

    index: int
    request: int
    phase: Phase
    first_token: int
    num_tokens: int


@dataclass(frozen=True)
class Trace:
    """Routing of every token through every MoE layer, in the order served.

    Arrays are read-only by convention; an expert id of -1 marks a token that an engine did not route through
    a layer (allowed in prefill only: engines prune the last layer to the token whose logits they need).
    """

    model: str
    layers: tuple[int, ...]
    """MoE layer numbers as the model counts them."""
    num_experts: int
    expert_bytes: tuple[int, ...]
    """Bytes of one expert, per MoE layer."""
    steps: tuple[Step, ...]
    experts: npt.NDArray[np.int16]
    """`[num_tokens, num_layers, top_k]`, best first."""
    weights: npt.NDArray[np.float32]
    """Applied routing weights, same shape as `experts`."""
    scores: npt.NDArray[np.float32] | None = None
    """Router probabilities averaged over the step's tokens, `[num_steps, num_layers, num_experts]`."""
    predicted: npt.NDArray[np.int16] | None = None
    """Next gates' choice, `[num_tokens, num_layers, depth, top_k]`: entry d of layer l speaks of layer l + 1 + d."""
    predicted_scores: npt.NDArray[np.float32] | None = None
    """Their probabilities averaged over the step's tokens, `[num_steps, num_layers, depth, num_experts]`."""
    token_scores: npt.NDArray[np.float16] | None = None
    """Router probabilities of every token, `[num_tokens, num_layers, num_experts]`; nothing is decided by them."""
    run: Mapping[str, Any] = field(default_factory=dict)
    """What the recorded run was configured with and counted, as plain data; empty where nobody noted it."""
    source: str = ""
    """Where the routing comes from; synthetic traces say so here."""
    _routings: dict[tuple[int, int], Routing] = field(default_factory=dict, repr=False, compare=False)
    _predictions: dict[tuple[int, int, int], Routing] = field(default_factory=dict, repr=False, compare=False)

    @property
    def top_k(self) -> int:
        return int(self.experts.shape[2])

    @property
    def depth(self) -> int:
        """How many layers ahead the recorded predictions reach; 0 without predictions."""
        return 0 if self.predicted is None else int(self.predicted.shape[2])

    @property
    def synthetic(self) -> bool:
        return self.source.startswith("synthetic")

    def specs(self, num_slots: int | tuple[int, ...] = 0) -> tuple[LayerSpec, ...]:
        """Return the core's description of each MoE layer with `num_slots` GPU slots each (or one count per layer)."""
        slots = (num_slots,) * len(self.layers) if isinstance(num_slots, int) else num_slots
        return tuple(
            LayerSpec(layer, self.num_experts, self.top_k, size, num_slots=count)
            for layer, size, count in zip(self.layers, self.expert_bytes, slots, strict=True)
        )

    def routing(self, step: Step, position: int) -> Routing:
        """Return what layer number `position` (counted from 0 among MoE layers) was asked to compute in `step`."""
        key = (step.index, position)
        if key not in self._routings:
            rows = slice(step.first_token, step.first_token + step.num_tokens)
            scores = None if self.scores is None else self.scores[step.index, position]
            self._routings[key] = make_routing(
                self.layers[position], self.experts[rows, position], self.weights[rows, position], scores
            )
        return self._routings[key]

    def predictions(self, step: Step, position: int, depth: int) -> tuple[Routing, ...]:
        """Return the recorded look-ahead from layer `position` for at most `depth` following layers."""
        reach = min(depth, self.depth, len(self.layers) - position - 1)
        return tuple(self._prediction(step, position, ahead) for ahead in range(reach))

    def _prediction(self, step: Step, position: int, ahead: int) -> Routing:
        key = (step.index, position, ahead)
        if key not in self._predictions:
            assert self.predicted is not None, "depth is 0 without predictions"
            rows = slice(step.first_token, step.first_token + step.num_tokens)
            scores = None if self.predicted_scores is None else self.predicted_scores[step.index, position, ahead]
            self._predictions[key] = make_routing(
                self.layers[position + 1 + ahead], self.predicted[rows, position, ahead], None, scores
            )
        return self._predictions[key]

    def phase_steps(self, phase: Phase) -> Iterator[Step]:
        """Yield the steps of one phase in order."""
        return (step for step in self.steps if step.phase == phase)

    def head(self, num_steps: int) -> Trace:
        """Return the first `num_steps` steps as a trace of their own (views, no copies)."""
        steps = self.steps[:num_steps]
        end = steps[-1].first_token + steps[-1].num_tokens

        def cut(array: Array | None, stop: int) -> Array | None:
            return None if array is None else array[:stop]

        return Trace(
            self.model, self.layers, self.num_experts, self.expert_bytes, steps, self.experts[:end], self.weights[:end],
            cut(self.scores, len(steps)), cut(self.predicted, end), cut(self.predicted_scores, len(steps)),
            cut(self.token_scores, end), self.run if len(steps) == len(self.steps) else self._uncounted(), self.source,
        )  # fmt: skip

    def _uncounted(self) -> dict[str, Any]:
        """The run without its counters, which hold for the whole trace only."""
        return {name: value for name, value in self.run.items() if name != "counters"}


def make_routing(
    layer: int,
    experts: npt.NDArray[np.integer],
    weights: npt.NDArray[np.floating] | None,
    scores: npt.NDArray[np.floating] | None,
) -> Routing:
    """Aggregate token rows `[num_tokens, top_k]` into the core's loads, experts in the order first met."""
    flat = experts.ravel()
    routed = flat[flat >= 0]
    # One token routes each expert once: only batches need counting.
    if experts.shape[0] == 1:
        order = routed.tolist()
        loads = dict.fromkeys(order, 1)
    else:
        values, first, counts = np.unique(routed, return_index=True, return_counts=True)
        rank = np.argsort(first)
        order = values[rank].tolist()
        loads = dict(zip(order, counts[rank].tolist(), strict=True))
    sums = None
    if weights is not None:
        total = np.bincount(routed, weights=weights.ravel()[flat >= 0])
        sums = {expert: float(total[expert]) for expert in order}
    return Routing(
        layer=layer,
        loads=loads,
        num_tokens=int((experts[:, 0] >= 0).sum()),
        scores=None if scores is None else tuple(scores.tolist()),
        weights=sums,
    )


def make_steps(requests: list[int], phases: list[Phase], num_tokens: list[int]) -> tuple[Step, ...]:
    """Lay steps one behind another on the token axis."""
    starts = np.concatenate([[0], np.cumsum(num_tokens)]).tolist()
    rows = zip(requests, phases, num_tokens, strict=True)
    return tuple(Step(i, request, phase, starts[i], count) for i, (request, phase, count) in enumerate(rows))


def check(trace: Trace, where: str) -> Trace:
    """Return `trace` unchanged, or raise a ConfigError that begins with `where` (the file it came from)."""
    _check_shapes(trace, where)
    _check_experts(trace, where)
    for name in ("weights", "scores", "predicted_scores", "token_scores"):
        array = getattr(trace, name)
        if array is not None and not np.isfinite(array).all():
            row = int(np.argwhere(~np.isfinite(array))[0][0])
            axis = "token" if name in ("weights", "token_scores") else "step"
            raise ConfigError(f"{where}: {name} of {axis} {row} are not finite numbers; record the trace again")
    return trace


def _check_shapes(trace: Trace, where: str) -> None:
    if not trace.steps:
        raise ConfigError(f"{where}: the trace is empty; it needs at least one step")
    tokens = trace.steps[-1].first_token + trace.steps[-1].num_tokens
    rows = {"experts": tokens, "weights": tokens, "predicted": tokens, "token_scores": tokens}
    tail = {
        "experts": (trace.top_k,),
        "weights": (trace.top_k,),
        "scores": (trace.num_experts,),
        "predicted": (trace.depth, trace.top_k),
        "predicted_scores": (trace.depth, trace.num_experts),
        "token_scores": (trace.num_experts,),
    }
    for name, last in tail.items():
        array = getattr(trace, name)
        expected = (rows.get(name, len(trace.steps)), len(trace.layers), *last)
        if array is not None and array.shape != expected:
            raise ConfigError(f"{where}: array {name!r} has shape {array.shape}, the header asks for {expected}")
    if len(trace.expert_bytes) != len(trace.layers):
        raise ConfigError(f"{where}: {len(trace.expert_bytes)} expert sizes for {len(trace.layers)} layers")


def _check_experts(trace: Trace, where: str) -> None:
    for name in ("experts", "predicted"):
        ids = getattr(trace, name)
        if ids is None:
            continue
        bad = np.argwhere((ids < ABSENT) | (ids >= trace.num_experts))
        if len(bad):
            spot = tuple(bad[0])
            raise ConfigError(
                f"{where}: unknown expert {int(ids[spot])} at token {spot[0]}, layer {trace.layers[spot[1]]};"
                f" valid: 0 to {trace.num_experts - 1}"
            )
    present: npt.NDArray[np.bool_] = np.all(trace.experts >= 0, axis=2)
    partial = np.argwhere((trace.experts >= 0).any(axis=2) != present)
    if len(partial):
        token, position = partial[0]
        layer = trace.layers[position]
        raise ConfigError(f"{where}: token {token} has fewer than {trace.top_k} experts in layer {layer}")
    for step in trace.steps:
        rows = present[step.first_token : step.first_token + step.num_tokens]
        missing = np.flatnonzero(~(rows.any(axis=0) if step.phase == "prefill" else rows.all(axis=0)))
        if len(missing):
            raise ConfigError(f"{where}: step {step.index} ({step.phase}) lacks layer {trace.layers[missing[0]]}")


def join(first: Trace, second: Trace) -> Trace:
    """Return `second` served after `first`, as one trace of the same model."""
    same = (first.layers, first.num_experts, first.top_k, first.depth) == (
        second.layers,
        second.num_experts,
        second.top_k,
        second.depth,
    )
    if not same:
        raise ConfigError("traces of different layers, experts or look-ahead cannot be joined")
    last = max(step.request for step in first.steps) + 1
    steps = (*first.steps, *second.steps)
    arrays: dict[str, Any] = {}
    for name in ("experts", "weights", "scores", "predicted", "predicted_scores", "token_scores"):
        left, right = getattr(first, name), getattr(second, name)
        arrays[name] = None if left is None or right is None else np.concatenate([left, right])
    return Trace(
        model=second.model,
        layers=second.layers,
        num_experts=second.num_experts,
        expert_bytes=second.expert_bytes,
        steps=make_steps(
            [step.request for step in first.steps] + [step.request + last for step in second.steps],
            [step.phase for step in steps],
            [step.num_tokens for step in steps],
        ),
        source=second.source,
        **arrays,
    )
