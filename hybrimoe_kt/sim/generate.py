"""Seeded synthetic traces: a residual stream that drifts through layers and tokens, read by random gates.

Every token has a latent state that changes a little from layer to layer; each layer's gate is a random matrix plus a
fixed bias per expert. Popularity skew comes from the bias, temporal locality from words that recur and from the
autocorrelation of the state, look-ahead accuracy from how much of the state survives a layer: the next gate applied to
the current state predicts as well as a real stale gate does, and errs in the same way (near ties, not random experts).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrimoe_kt.errors import ConfigError, unknown_name

from .models import ModelSpec, find_model
from .trace import Phase, Trace, make_steps

Floats = npt.NDArray[Any]
"""Single precision throughout."""
STATE_SIZE = 6
"""Dimensions of the latent state. Few, because real tokens find earlier ones with most of their experts: the mean best
match is .57 and .61 of the experts in the recorded traces, .56 here, .38 with 48 dimensions and no recurring words."""
LOGIT_SPREAD = 1.3
"""Standard deviation of router logits; gives the weights of a top-6 of 128 the ratios that real traces show."""
VOCABULARY = 300
"""Kinds of words that route differently; drawn with probability 1 / rank, as in text."""
WORD_SHARE = 0.9
"""Share of a token's fresh variance that its word fixes: the same word comes back with a similar routing."""
CONTEXT_TOKENS = 12.0
"""Correlation length of the context part of the state, tokens; fits reuse at lags 2 to 8 of both recorded traces."""


@dataclass(frozen=True, slots=True)
class Locality:
    """The four numbers in which models differ, each between 0 and 1.

    `popularity`: share of the router logits' variance that is a fixed preference of the layer for some experts.
    `context`: share of the state's variance that follows the context over `CONTEXT_TOKENS`; the rest is the token's
    own, with lag-one correlation `carry`. `drift`: share of the state's variance that one layer replaces.
    """

    popularity: float
    context: float
    carry: float
    drift: float


LOCALITY = {
    # Published LRU hit rates of .302 at 25 % and .806 at 75 %; look-ahead top-1 96 % at one layer, about 90 % at two.
    "mixtral-8x7b": Locality(0.02, 0.05, 0.0, 0.05),
    # Published LRU hit rate of .450 at 25 %, shape as DeepSeek-V2-Lite; look-ahead as Qwen3.6-35B's 80.7 %.
    "qwen2-57b-a14b": Locality(0.01, 0.03, 0.38, 0.065),
    # Published LRU hit rate of .477 at 25 %, consecutive Jaccard .20 to .28, look-ahead 78.8 %.
    "deepseek-v2-lite": Locality(0.02, 0.0, 0.46, 0.063),
    # The recorded trace of this model: skew, reuse and LRU hit rates; look-ahead 88.6 %.
    "qwen3-30b-a3b": Locality(0.28, 0.2, 0.33, 0.025),
}
"""Per model; the comment names the published or recorded measurements that fixed the numbers."""


def generate(
    model: str | ModelSpec,
    *,
    prompt_tokens: int = 128,
    tokens: int = 64,
    seed: int = 0,
    depth: int = 3,
    locality: Locality | None = None,
) -> Trace:
    """Return one request: a prompt of `prompt_tokens` in one prefill step, then `tokens` decode steps.

    The same arguments give the same arrays; popularity depends on model and layer only, not on `seed`, as two prompts
    to one model share its gates. `depth` layers of stale-gate predictions come along (0 for none).
    """
    spec = find_model(model) if isinstance(model, str) else model
    _check_counts(prompt_tokens, tokens, depth, seed)
    shape = locality or _locality_of(spec.name)
    gates, bias = _gates(spec)
    total = prompt_tokens + tokens
    state = _state(np.random.default_rng([seed, *spec.name.encode()]), total, _words(spec), shape)
    scores = _softmax(_logits(state, gates, bias, shape))
    counts = ([prompt_tokens] if prompt_tokens else []) + [1] * tokens
    phases: list[Phase] = ["prefill"] * bool(prompt_tokens)
    phases += ["decode"] * tokens
    experts, weights = _choose(scores, spec.top_k)
    ahead = [_look_ahead(state, gates, bias, shape, d) for d in range(1, depth + 1)]
    return Trace(
        model=spec.name,
        layers=spec.moe_layers,
        num_experts=spec.num_experts,
        expert_bytes=(spec.expert_bytes,) * len(spec.moe_layers),
        steps=make_steps([0] * len(counts), phases, counts),
        experts=experts,
        weights=weights,
        scores=_per_step(scores, counts),
        predicted=np.stack([_choose(guess, spec.top_k)[0] for guess in ahead], axis=2) if ahead else None,
        predicted_scores=np.stack([_per_step(guess, counts) for guess in ahead], axis=2) if ahead else None,
        source=f"synthetic: seed {seed}, {prompt_tokens} prompt tokens, {tokens} decode tokens",
    )


def _check_counts(prompt_tokens: int, tokens: int, depth: int, seed: int) -> None:
    for name, value in (("prompt tokens", prompt_tokens), ("tokens", tokens), ("seed", seed), ("depth", depth)):
        if value < 0:
            raise ConfigError(f"{name} {value} is negative; use 0 or more")
    if prompt_tokens + tokens == 0:
        raise ConfigError("a trace needs at least one prompt token or one decode token")


def _locality_of(name: str) -> Locality:
    if name not in LOCALITY:
        raise ConfigError(unknown_name("synthetic trace", name, LOCALITY))
    return LOCALITY[name]


def _gates(spec: ModelSpec) -> tuple[Floats, Floats]:
    """Return gates of unit columns `[num_layers, STATE_SIZE, num_experts]` and biases `[num_layers, num_experts]`."""
    rng = np.random.default_rng(list(spec.name.encode()))
    shape = (len(spec.moe_layers), STATE_SIZE, spec.num_experts)
    gates = rng.standard_normal(shape, dtype=np.float32)
    gates /= np.linalg.norm(gates, axis=1, keepdims=True)
    return gates, rng.standard_normal((shape[0], shape[2]), dtype=np.float32)


def _words(spec: ModelSpec) -> Floats:
    """Return what each word of the vocabulary contributes, `[VOCABULARY, num_layers, STATE_SIZE]`, fixed per model."""
    rng = np.random.default_rng([1, *spec.name.encode()])
    return rng.standard_normal((VOCABULARY, len(spec.moe_layers), STATE_SIZE), dtype=np.float32)


def _state(rng: np.random.Generator, tokens: int, words: Floats, shape: Locality) -> Floats:
    """Return `[num_tokens, num_layers, STATE_SIZE]` of unit variance, correlated along tokens and layers."""
    layers = words.shape[1]
    size = (tokens, layers, STATE_SIZE)
    slow = _correlate(rng.standard_normal(size, dtype=np.float32), float(np.exp(-1.0 / CONTEXT_TOKENS)))
    odds = 1.0 / np.arange(1, VOCABULARY + 1)
    text = rng.choice(VOCABULARY, size=tokens, p=odds / odds.sum())
    own = np.float32(np.sqrt(1.0 - WORD_SHARE)) * rng.standard_normal(size, dtype=np.float32)
    own += np.float32(np.sqrt(WORD_SHARE)) * words[text]
    fast = _correlate(own, shape.carry)
    fresh = np.sqrt(shape.context) * slow + np.sqrt(1.0 - shape.context) * fast
    keep = np.float32(np.sqrt(1.0 - shape.drift))
    for layer in range(1, layers):
        fresh[:, layer] = keep * fresh[:, layer - 1] + np.float32(np.sqrt(shape.drift)) * fresh[:, layer]
    result: Floats = fresh.astype(np.float32)
    return result


def _correlate(noise: Floats, carry: float) -> Floats:
    """Turn white noise along axis 0 into an AR(1) process of the same variance, in place."""
    gain = np.float32(np.sqrt(1.0 - carry * carry))
    for token in range(1, len(noise)):
        noise[token] = np.float32(carry) * noise[token - 1] + gain * noise[token]
    return noise


def _logits(state: Floats, gates: Floats, bias: Floats, shape: Locality) -> Floats:
    """Return `[num_tokens, num_layers, num_experts]`."""
    # [L, T, D] @ [L, D, E]: one BLAS call per layer.
    read = np.matmul(state.transpose(1, 0, 2), gates).transpose(1, 0, 2)
    pull = np.float32(np.sqrt(shape.popularity)) * bias + np.float32(np.sqrt(1.0 - shape.popularity)) * read
    result: Floats = np.float32(LOGIT_SPREAD) * pull
    return result


def _look_ahead(state: Floats, gates: Floats, bias: Floats, shape: Locality, ahead: int) -> Floats:
    """Return scores that the gates `ahead` layers on give to each layer's state; the last ones repeat the last gate."""
    later = np.minimum(np.arange(len(gates)) + ahead, len(gates) - 1)
    return _softmax(_logits(state, gates[later], bias[later], shape))


def _softmax(logits: Floats) -> Floats:
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    result: Floats = powers / powers.sum(axis=-1, keepdims=True)
    return result


def _choose(scores: Floats, top_k: int) -> tuple[npt.NDArray[np.int16], Floats]:
    """Return the `top_k` best experts, best first, and their weights normalised to 1."""
    best = np.argpartition(-scores, top_k - 1, axis=-1)[..., :top_k]
    values = np.take_along_axis(scores, best, axis=-1)
    order = np.argsort(-values, axis=-1, kind="stable")
    best = np.take_along_axis(best, order, axis=-1)
    values = np.take_along_axis(values, order, axis=-1)
    return best.astype(np.int16), values / values.sum(axis=-1, keepdims=True)


def _per_step(scores: Floats, counts: list[int]) -> Floats:
    """Average `[num_tokens, ...]` over each step's tokens."""
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64)
    sums = np.add.reduceat(scores, starts, axis=0)
    result: Floats = (sums / np.array(counts)[:, None, None]).astype(np.float32)
    return result
