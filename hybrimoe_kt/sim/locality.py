"""Locality statistics of decode routing: reuse, overlap, skew, gate look-ahead accuracy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrimoe_kt.core.prefetch.predictors import make_predictor

from .trace import Step, Trace

LAGS = (1, 2, 4, 8, 16)
SHARES = (0.1, 0.25, 0.5)
_MOST_PREDICTED = 20_000
"""Layer steps on which a learning predictor is judged, so that a summary takes seconds."""


def summarize(trace: Trace) -> dict[str, Any]:
    """Return a trace's locality as plain data: shares 0 to 1, entropies in bits; None where there is nothing to count.

    Tokens of all phases count, each beside those of its own request. `chance` is what uniform routing would reuse.
    """
    counts = usage(trace)
    ordered = -np.sort(-counts, axis=1) / np.maximum(1, counts.sum(axis=1, keepdims=True))
    entropies, choices = _entropy(counts / np.maximum(1, counts.sum(axis=1, keepdims=True))), _router_entropy(trace)
    layers = [
        {
            "layer": layer,
            "usage_entropy_bits": float(entropies[place]),
            "router_entropy_bits": None if choices is None else float(choices[place]),
            "reuse": _mean(_reused(trace, 1, place)),
            "top_expert": int(counts[place].argmax()),
            "top_expert_share": float(ordered[place, 0]),
            "unused_experts": int((counts[place] == 0).sum()),
        }
        for place, layer in enumerate(trace.layers)
    ]
    return {
        "num_tokens": len(trace.experts),
        "num_steps": len(trace.steps),
        "num_requests": len({step.request for step in trace.steps}),
        "chance": trace.top_k / trace.num_experts,
        "max_entropy_bits": float(np.log2(trace.num_experts)),
        "reuse": {str(lag): _mean(_reused(trace, lag)) for lag in LAGS},
        "coverage": {f"{share:.0%}": float(_top(ordered, share).mean()) for share in SHARES},
        "layers": layers,
        "look_ahead_recall": {name: recall(trace, name) for name in ("stale_gate", "corrected_gate")},
    }


def usage(trace: Trace) -> npt.NDArray[np.int64]:
    """Return how often each expert was chosen, `[num_layers, num_experts]`."""
    layers, num_experts = len(trace.layers), trace.num_experts
    offset = np.arange(layers)[None, :, None] * num_experts
    chosen = (trace.experts.astype(np.int64) + offset)[trace.experts >= 0]
    return np.bincount(chosen, minlength=layers * num_experts).reshape(layers, num_experts)


def recall(trace: Trace, predictor: str) -> list[float | None]:
    """Return, per depth, the share of routed experts that `predictor` named among as many, on the trace's look-ahead.

    A learning predictor is judged while it learns, on steps of one token, at most so many as take seconds.
    """
    if predictor == "stale_gate":
        return [_finite(gate_accuracy(trace, ahead)) for ahead in range(trace.depth)]
    guesser = make_predictor(predictor, trace.specs(), {})
    right, routed = [0] * trace.depth, [0] * trace.depth
    for step in _lone_tokens(trace):
        for position in range(len(trace.layers)):
            routing = trace.routing(step, position)
            guesser.observe(routing)
            guesses = guesser.predict(routing, trace.predictions(step, position, trace.depth), trace.depth)
            for ahead, guess in enumerate(guesses):
                actual = trace.routing(step, position + 1 + ahead).loads
                right[ahead] += len(actual.keys() & guess.loads.keys())
                routed[ahead] += len(actual)
    return [hits / total if total else None for hits, total in zip(right, routed, strict=True)]


def recall_by_layer(trace: Trace) -> list[list[float | None]]:
    """Return, per MoE layer and depth, the share of its experts that its own gate named so many layers before; None
    where no earlier layer reaches so far, as for the first layer at any depth."""
    found: list[list[float | None]] = []
    for position in range(len(trace.layers)):
        row: list[float | None] = []
        for ahead in range(trace.depth):
            origin = position - 1 - ahead
            if trace.predicted is None or origin < 0:
                row.append(None)
                continue
            actual, guess = trace.experts[:, position], trace.predicted[:, origin, ahead]
            valid = (actual[:, 0] >= 0) & (guess[:, 0] >= 0)
            row.append(_mean((actual[:, :, None] == guess[:, None, :]).any(axis=-1)[valid]))
        found.append(row)
    return found


def _lone_tokens(trace: Trace) -> Iterator[Step]:
    most = max(1, _MOST_PREDICTED // len(trace.layers))
    yield from [step for step in trace.steps if step.num_tokens == 1][:most]


def _reused(trace: Trace, lag: int, position: int | None = None) -> npt.NDArray[np.bool_]:
    """Whether each routed expert was also chosen `lag` tokens before in the same request; one layer, or all."""
    experts = trace.experts if position is None else trace.experts[:, position : position + 1]
    requests = np.repeat([step.request for step in trace.steps], [step.num_tokens for step in trace.steps])
    if len(experts) <= lag:
        return np.empty(0, dtype=bool)
    valid = (requests[lag:] == requests[:-lag])[:, None] & (experts[lag:, :, 0] >= 0) & (experts[:-lag, :, 0] >= 0)
    shared: npt.NDArray[np.bool_] = _shared(experts, lag)[valid]
    return shared


def _entropy(shares: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    """Return the entropy of the last axis in bits."""
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = np.where(shares > 0, -shares * np.log2(shares), 0.0)
    entropy: npt.NDArray[np.floating] = parts.sum(axis=-1)
    return entropy


def _router_entropy(trace: Trace) -> npt.NDArray[np.floating] | None:
    """Return the mean entropy of the router's probabilities per layer, `[num_layers]`; of steps, where no token's
    were kept."""
    scores = trace.token_scores if trace.token_scores is not None else trace.scores
    return None if scores is None else _entropy(scores.astype(np.float32)).mean(axis=0)


def _top(ordered: npt.NDArray[np.floating], share: float) -> npt.NDArray[np.floating]:
    top: npt.NDArray[np.floating] = ordered[:, : max(1, int(ordered.shape[1] * share))].sum(axis=1)
    return top


def _mean(values: npt.NDArray[np.bool_]) -> float | None:
    return float(values.mean()) if values.size else None


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def gate_accuracy(trace: Trace, ahead: int = 0, top: int | None = None) -> float:
    """Share of routed slots that the look-ahead `ahead + 1` layers before named; `top=1`: the first slot only."""
    if trace.predicted is None or ahead >= trace.depth:
        return float("nan")
    actual = trace.experts[:, ahead + 1 :, :top]
    guess = trace.predicted[:, : len(trace.layers) - ahead - 1, ahead]
    valid = (actual[..., :1] >= 0) & (guess[..., :1] >= 0)
    hit = (actual[..., :, None] == guess[..., None, :]).any(axis=-1)
    return float(hit[np.broadcast_to(valid, hit.shape)].mean())


def _shared(experts: npt.NDArray[np.integer], lag: int) -> npt.NDArray[np.bool_]:
    common: npt.NDArray[np.bool_] = (experts[lag:, :, :, None] == experts[:-lag, :, None, :]).any(axis=-1)
    return common
