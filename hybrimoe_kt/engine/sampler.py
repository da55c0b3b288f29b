"""The next token out of a step's logits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .sampling import Sampling

__all__ = ["Sampled", "Sampler"]


@dataclass(frozen=True, slots=True)
class Sampled:
    """A drawn token; natural log-probabilities under the model's own distribution, before any of `Sampling`'s changes.

    `likeliest` holds `(token, logprob)` in falling order.
    """

    token: int
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Draws tokens one after the other; the same seed draws the same tokens."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int] = ()) -> None:
        self._sampling = sampling
        self._greedy = sampling.temperature < 1e-6  # below, dividing by it overflows
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)
        self._biased = torch.tensor(list(sampling.logit_bias), dtype=torch.long)
        self._biases = torch.tensor(list(sampling.logit_bias.values()), dtype=torch.float32)
        self._counts: Counter[int] = Counter()
        self._met = dict.fromkeys(prompt) if sampling.repetition_penalty != 1.0 else {}
        self._warpers = LogitsProcessorList([] if self._greedy else _warpers(sampling))

    def __call__(self, logits: torch.Tensor) -> Sampled:
        """Draw from `logits [vocab]`, float32 on the CPU, which stay as they are."""
        scores = self._penalised(logits)
        if self._greedy:
            token = int(scores.argmax())
        else:
            unused: Any = torch.empty(1, 0, dtype=torch.long)  # ids so far, which none of these looks at
            warped = self._warpers(unused, scores[None])
            token = int(torch.multinomial(torch.softmax(warped[0], dim=-1), 1, generator=self._generator))
        self._counts[token] += 1
        if self._sampling.num_logprobs is None:
            return Sampled(token)
        logprobs = torch.log_softmax(logits, dim=-1)
        best = logprobs.topk(min(self._sampling.num_logprobs, len(logprobs)))
        return Sampled(
            token, float(logprobs[token]), tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        )

    def _penalised(self, logits: torch.Tensor) -> torch.Tensor:
        sampling = self._sampling
        if sampling.logit_bias:
            logits = logits.index_add(0, self._biased, self._biases)
        if sampling.repetition_penalty != 1.0:
            self._met.update(dict.fromkeys(self._counts))
            penalise = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)
            logits = penalise(torch.tensor([list(self._met)]), logits[None].clone())[0]
        if self._counts and (sampling.frequency_penalty or sampling.presence_penalty):
            counts = torch.tensor(list(self._counts.values()), dtype=torch.float32)
            taken = sampling.frequency_penalty * counts + sampling.presence_penalty
            logits = logits.index_add(0, torch.tensor(list(self._counts)), taken, alpha=-1)
        return logits


def _warpers(sampling: Sampling) -> list[object]:
    warpers: list[object] = [TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_k > 0:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0.0:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    return warpers
