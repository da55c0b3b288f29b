"""The next token out of a step's logits."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

import torch
from transformers.generation import RepetitionPenaltyLogitsProcessor

from .forms.token_matcher import TokenMatcher
from .kept_tokens import draw_from, kept_tokens
from .sampling import Sampling

__all__ = ["Sampled", "Sampler"]

# What keeps a token from being drawn. Finite: with every token forbidden there is still a likeliest one.
_FORBIDDEN = -1e9


class Sampled(NamedTuple):
    """A token and where it stands: the prompt's own, drawn for the answer, or drawn and its end.

    Natural log-probabilities under the model's own distribution, before any of `Sampling`'s changes; None where they
    were not asked for, and of a prompt's first token. `likeliest` holds `(token, logprob)` in falling order.
    """

    token: int
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()
    place: Literal["prompt", "answer", "end"] = "answer"


class Sampler:
    """Draws tokens one after the other; the same seed draws the same tokens."""

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int] = (),
        forbidden: Collection[int] = (),
        matcher: TokenMatcher | None = None,
    ) -> None:
        """`forbidden` tokens are never drawn, but to end an answer that is complete by `matcher`."""
        self._sampling, self._matcher = sampling, matcher
        self._greedy = sampling.temperature < 1e-6  # below, dividing by it overflows
        self._generator = torch.Generator()
        if sampling.seed is None or sampling.seed < 0:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)
        biases = {**sampling.logit_bias, **dict.fromkeys(forbidden, _FORBIDDEN)}
        self._biased = torch.tensor(list(biases), dtype=torch.long)
        self._biases = torch.tensor(list(biases.values()), dtype=torch.float32)
        self._counts: Counter[int] = Counter()
        self._met = dict.fromkeys(prompt) if sampling.repetition_penalty != 1.0 else {}
        self._window = deque(prompt, sampling.penalty_window)
        penalties = sampling.repetition_penalty - 1, sampling.frequency_penalty, sampling.presence_penalty
        self._penalises = any(penalties)

    @property
    def is_over(self) -> bool:
        """Whether the answer is complete and nothing can be added to it: the next token drawn would be its end."""
        return self._matcher is not None and self._matcher.is_over

    def __call__(self, logits: torch.Tensor) -> Sampled:
        """Draw from `logits [vocab]`, float32 on the CPU, which stay as they are.

        ConfigError where the form of the answer has become too large to follow.
        """
        if self._matcher is not None and self._matcher.is_over:
            token = self._matcher.end_id
        else:
            scores = self._penalised(logits)
            token = self._drawn(scores if self._matcher is None else self._matcher.masked(scores))
            if self._matcher is not None:
                self._matcher.accept(token)
        self._count(token)
        if self._sampling.num_logprobs is None:
            return Sampled(token)
        logprobs = torch.log_softmax(logits, dim=-1)
        best = logprobs.topk(min(self._sampling.num_logprobs, len(logprobs)))
        return Sampled(
            token, float(logprobs[token]), tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        )

    def _drawn(self, scores: torch.Tensor) -> int:
        values, sampling = scores.numpy(), self._sampling
        if self._greedy:
            return int(values.argmax())  # numpy's, which is ten times as fast as torch's here
        tokens, weights = kept_tokens(values, sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p)
        place = draw_from(weights, float(torch.rand((), dtype=torch.float64, generator=self._generator)))
        return place if tokens is None else int(tokens[place])

    def _count(self, token: int) -> None:
        if not self._penalises:
            return
        if self._sampling.penalty_window is None:
            self._counts[token] += 1
            self._met[token] = None
        else:
            self._window.append(token)

    def _penalised(self, logits: torch.Tensor) -> torch.Tensor:
        sampling = self._sampling
        if len(self._biased):
            logits = logits.index_add(0, self._biased, self._biases)
        if sampling.penalty_window is not None and self._penalises:
            self._counts = Counter(self._window)
            self._met = dict.fromkeys(self._window)
        if self._met and sampling.repetition_penalty != 1.0:
            penalise = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)
            logits = penalise(torch.tensor([list(self._met)]), logits[None].clone())[0]
        if self._counts and (sampling.frequency_penalty or sampling.presence_penalty):
            counts = torch.tensor(list(self._counts.values()), dtype=torch.float32)
            taken = sampling.frequency_penalty * counts + sampling.presence_penalty
            logits = logits.index_add(0, torch.tensor(list(self._counts)), taken, alpha=-1)
        return logits
