"""How alike a trace's tokens are, measured independently of the package: what the generator is calibrated by."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hybrimoe_kt.sim.locality import _shared as shared
from hybrimoe_kt.sim.trace import Trace


def decode_experts(trace: Trace) -> npt.NDArray[np.int16]:
    """Return `[num_decode_tokens, num_layers, top_k]`."""
    rows = [slice(step.first_token, step.first_token + step.num_tokens) for step in trace.phase_steps("decode")]
    return np.concatenate([trace.experts[row] for row in rows])


def reuse(experts: npt.NDArray[np.integer], lag: int) -> float:
    """Share of a token's experts that the token `lag` before it used too, `[num_tokens, num_layers, top_k]`."""
    return float(shared(experts, lag).mean())


def jaccard(experts: npt.NDArray[np.integer]) -> float:
    """Mean intersection over union of consecutive tokens' expert sets."""
    common = shared(experts, 1).sum(axis=-1)
    return float((common / (2 * experts.shape[-1] - common)).mean())


def best_match(experts: npt.NDArray[np.integer], *, skip: int = 8) -> float:
    """Mean share of a token's experts, over all layers, that its most similar earlier token used; the first `skip`
    tokens have too few predecessors to count."""
    best = [
        (experts[token][None, :, :, None] == experts[:token, :, None, :]).any(axis=-1).mean(axis=(1, 2)).max()
        for token in range(skip, len(experts))
    ]
    return float(np.mean(best))


def popularity(experts: npt.NDArray[np.integer], num_experts: int, share: float) -> float:
    """Share of all routings that go to the most used `share` of each layer's experts, averaged over layers."""
    layers = experts.shape[1]
    offset = np.arange(layers)[None, :, None] * num_experts
    counts = np.bincount((experts + offset).ravel(), minlength=layers * num_experts).reshape(layers, num_experts)
    ordered = -np.sort(-counts, axis=1)
    top = ordered[:, : max(1, int(num_experts * share))].sum(axis=1)
    return float((top / ordered.sum(axis=1)).mean())


def lru_hit_rate(trace: Trace, num_slots: int) -> float:
    """Hit rate of a plain LRU cache of `num_slots` per layer that starts empty and admits every routed expert.

    Independent of the core on purpose: the generator is calibrated and the core's own LRU is checked with it.
    """
    hits = total = 0
    for position in range(len(trace.layers)):
        recent: dict[int, None] = {}
        for step in trace.phase_steps("decode"):
            for row in trace.experts[step.first_token : step.first_token + step.num_tokens, position].tolist():
                hits += sum(expert in recent for expert in row)
                total += len(row)
                for expert in row:
                    recent.pop(expert, None)
                    recent[expert] = None
                while len(recent) > num_slots:
                    del recent[next(iter(recent))]
    return hits / total
